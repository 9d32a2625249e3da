"""Factors of gating weights: what answers are worth under them, and what a little more or less of each would change."""

import pytest
import torch
from remote_models import KINDS, remote_folder
from training_cases import EXAMPLES, prompts

from moe_lens import ExpertSet, MoELens, Zero


def ones(lens: MoELens, rows: int) -> torch.Tensor:
    return torch.ones(rows, len(lens.architecture.moe_layers), lens.architecture.n_experts)


def expect_right_gradients(lens: MoELens) -> None:
    """The largest gradient of a row under factors of all kinds is the slope that two other calls show."""
    rows = prompts(lens)[:4]
    factors = torch.rand(ones(lens, 4).shape, generator=torch.Generator().manual_seed(0)).mul(2).round() / 2
    values, gradient = lens.answer_gradients(rows, factors)
    for row in (0, 3):
        place = (row, *divmod(int(gradient[row].abs().argmax()), gradient.shape[-1]))
        others, slopes = [other for other in range(4) if other != row], []
        expected = pytest.approx(gradient[place].item(), rel=2e-2, abs=5e-3)
        for step in (1e-2, 2e-3, 5e-4):  # until no token selects other experts on the way
            higher, lower = factors.clone(), factors.clone()
            higher[place] += step
            lower[place] -= step
            ends = [lens.answer_gradients(rows, one)[0] for one in (higher, lower)]
            slopes.append(float((ends[0] - ends[1])[row]) / (2 * step))
            assert torch.equal(ends[0][others], values[others]), "a factor moved another row"
            if slopes[-1] == expected:
                break
        assert slopes[-1] == expected, slopes


def test_gradients_are_the_slopes_of_the_answers_log_probability(lens):
    expect_right_gradients(lens)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_right_where_experts_are_listed(tokenizer, tmp_path, kind):
    folder = remote_folder(tmp_path / kind, tokenizer, KINDS[kind])
    expect_right_gradients(MoELens.from_pretrained(folder, trust_remote_code=True))


def test_factors_of_one_change_nothing_and_of_nought_are_zero(lens, most_used_experts):
    rows, factors = prompts(lens)[:3], ones(lens, 3)
    plain = lens.answer_log_probabilities(EXAMPLES[:3], progress=False)
    assert lens.answer_gradients(rows, factors)[0].tolist() == pytest.approx(plain, abs=1e-5)
    with lens.intervene(Zero(most_used_experts)):
        masked = lens.answer_log_probabilities(EXAMPLES[:3], progress=False)
    for layer, expert in most_used_experts:
        factors[1, lens.architecture.moe_layers.index(layer), expert] = 0
    found = lens.answer_gradients(rows, factors)[0].tolist()
    assert found == pytest.approx([plain[0], masked[1], plain[2]], abs=1e-5)
    assert masked[1] != pytest.approx(plain[1], abs=1e-3)


def test_experts_without_weight_have_a_gradient_too_and_others_none(olmoe):
    """What a masked expert would give back is told; one that no token of the row selects can give nothing."""
    rows, factors = prompts(olmoe)[:1], ones(olmoe, 1)
    record = next(olmoe.records(EXAMPLES[:1], with_answer=True, progress=False))
    factors[0, 1] = 0
    _, gradient = olmoe.answer_gradients(rows, factors)
    selected = record.routing[1].selected()[0].any(0)
    assert bool((gradient[0, 1][selected] != 0).all())
    assert not gradient[0, 1][~selected].any()


def test_the_model_is_left_as_it_was(olmoe):
    asking = {name: parameter.requires_grad for name, parameter in olmoe.module.named_parameters()}
    gradients = [parameter.grad for parameter in olmoe.module.parameters()]
    some = next(iter(asking))
    olmoe.module.get_parameter(some).requires_grad_(False)
    try:
        with olmoe.intervene(Zero(ExpertSet.of({1: [0]}))):
            olmoe.answer_gradients(prompts(olmoe)[:2], ones(olmoe, 2))
            assert len(olmoe.interventions) == 1
        found = {name: parameter.requires_grad for name, parameter in olmoe.module.named_parameters()}
        assert found == asking | {some: False}
        left = [parameter.grad for parameter in olmoe.module.parameters()]
        assert all(after is before for after, before in zip(left, gradients, strict=True))
        assert not olmoe.interventions
    finally:
        olmoe.module.get_parameter(some).requires_grad_(asking[some])
