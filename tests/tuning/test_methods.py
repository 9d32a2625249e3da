"""Methods: what is trained is exactly what was asked for, at full fine-tuning's gradients; slices in every family."""

from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, build_model
from test_tuning import EXAMPLES, SCHEDULE, fresh, prompts

from moe_lens import ExpertSet, MoELens, MoELensError
from moe_lens.data import collate
from moe_lens.tuning import TuneAll, TuneExperts, TuneRouters, fit, slices
from moe_lens.tuning.objective import answer_loss
from moe_lens.tuning.slices import FUSED
from moe_lens.tuning.state import training

TEXTS = [f"{example.context} {example.question}" for example in EXAMPLES[:4]]
OTHER_FAMILIES = {
    "gpt_oss": {"layer_types": ["full_attention"] * 3},
    "granitemoe": {},
}
ALL_FAMILIES = (*FAMILIES, *OTHER_FAMILIES)


def open_family(tokenizer, family: str, **changes) -> MoELens:
    return fresh(tokenizer, family, **(OTHER_FAMILIES.get(family, {}) | changes))


def some_experts(lens: MoELens, size: int = 3) -> ExpertSet:
    """Experts in every layer but the first, other ones in each."""
    layers = lens.architecture.moe_layers[1:]
    return ExpertSet.of({layer: [(layer + 2 * i) % 8 for i in range(size)] for layer in layers})


def gradients(lens: MoELens, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Of the answers' loss, with respect to the named parameters."""
    parameters = [lens.module.get_parameter(name).requires_grad_() for name in names]
    batch = collate(prompts(lens)[:5], lens.tokenizer.pad_token_id)
    found = torch.autograd.grad(answer_loss(lens.module, batch), parameters)
    lens.module.requires_grad_(False)
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_chosen_experts_gradients_are_those_of_full_fine_tuning(tokenizer, family):
    lens = open_family(tokenizer, family)
    experts = some_experts(lens)
    with TuneExperts(experts).attached(lens) as trainable:
        ours = gradients(lens, trainable.names)
    lens.module.set_experts_implementation("eager")
    whole = gradients(lens, trainable.changed)
    assert len(ours) == sum(len(experts.layers) for field in FUSED if any(n.endswith(f".{field}") for n in whole))
    for name, gradient in ours.items():
        base = name.replace("trained_", "")
        expected = whole[base][list(trainable.rows[base])]
        assert expected.abs().max() > 0
        largest = float(expected.abs().max())  # sums in another order differ by a few roundings of it, 1e-7 each
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * largest + 1e-9)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_attaching_changes_no_logit_and_leaves_no_trace(tokenizer, family):
    lens = open_family(tokenizer, family)
    before = {name: value.clone() for name, value in lens.module.state_dict().items()}
    implementation = lens.module.config._experts_implementation
    expected, _ = lens.run_with_cache(TEXTS)
    with TuneExperts(some_experts(lens)).attached(lens) as trainable:
        assert trainable.count == sum(lens.module.get_parameter(name).numel() for name in trainable.names)
        assert trainable.total == sum(value.numel() for name, value in lens.module.named_parameters()) - trainable.count
        torch.testing.assert_close(lens.run_with_cache(TEXTS)[0], expected, rtol=1e-5, atol=1e-5)
    after = lens.module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert lens.module.config._experts_implementation == implementation
    assert torch.equal(lens.run_with_cache(TEXTS)[0], expected)


def test_training_changes_the_chosen_experts_and_no_other_bit_also_with_weight_decay(tokenizer):
    lens = fresh(tokenizer)
    experts = some_experts(lens)
    before = {name: value.clone() for name, value in lens.module.state_dict().items()}
    with TuneExperts(experts).attached(lens) as trainable:
        fit(lens.module, trainable.names, prompts(lens), replace(SCHEDULE, weight_decay=0.1), pad_id=0)
    changed = {
        (name, expert)
        for name, value in lens.module.state_dict().items()
        if not torch.equal(value, before[name])
        for expert in (range(len(value)) if name in trainable.rows else [None])
        if expert is None or not torch.equal(value[expert], before[name][expert])
    }
    assert changed == {(name, expert) for name, ids in trainable.rows.items() for expert in ids}
    assert {name.split(".")[2] for name, _ in changed} == {"1", "2"}


def test_training_slices_gives_the_same_bytes_also_with_two_threads(tokenizer):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        results = []
        for _ in range(2):
            lens = fresh(tokenizer)
            with TuneExperts(some_experts(lens)).attached(lens) as trainable:
                fit(lens.module, trainable.names, prompts(lens), replace(SCHEDULE, epochs=1), pad_id=0)
            results.append(torch.cat([lens.module.get_parameter(name).flatten() for name in trainable.changed]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_after_training_the_model_answers_as_it_did_while_attached(tokenizer):
    lens = fresh(tokenizer)
    base, _ = lens.run_with_cache(TEXTS)
    with TuneExperts(some_experts(lens)).attached(lens) as trainable:
        fit(lens.module, trainable.names, prompts(lens), SCHEDULE, pad_id=0)
        attached, _ = lens.run_with_cache(TEXTS)
        words = lens.generate(TEXTS, max_new_tokens=4, progress=False)
    assert not torch.allclose(attached, base, atol=1e-2)
    torch.testing.assert_close(lens.run_with_cache(TEXTS)[0], attached, rtol=1e-5, atol=1e-5)
    assert lens.generate(TEXTS, max_new_tokens=4, progress=False) == words


def test_a_plain_checkpoint_is_refused_while_slices_are_attached(tokenizer, tmp_path):
    lens = fresh(tokenizer)
    with TuneExperts(some_experts(lens)).attached(lens), pytest.raises(MoELensError, match="leave the training block"):
        lens.module.save_pretrained(tmp_path)
    lens.module.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_every_method_states_what_it_trains(tokenizer):
    lens = fresh(tokenizer)
    total = sum(parameter.numel() for parameter in lens.module.parameters())
    layer = 8 * 3 * 32 * lens.module.config.intermediate_size  # all experts of one layer
    for method, count in (
        (TuneRouters(), 3 * 8 * 32),
        (TuneRouters(layers=(1,)), 8 * 32),
        (TuneExperts(ExpertSet.of({0: [1], 2: [0, 7]})), 3 * layer // 8),
        (TuneAll(), total),
    ):
        with method.attached(lens) as trainable:
            assert (trainable.count, trainable.total) == (count, total)
            assert str(trainable) == f"{count:,} of {total:,} parameters are trained"
        assert method.facts()["method"] == method.name


def test_full_fine_tuning_changes_every_parameter(tokenizer):
    lens = fresh(tokenizer)
    before = {name: value.clone() for name, value in lens.module.named_parameters()}
    with TuneAll().attached(lens) as trainable:
        fit(lens.module, trainable.names, prompts(lens), SCHEDULE, pad_id=0)
    assert all(not torch.equal(value, before[name]) for name, value in lens.module.named_parameters())


def test_experts_that_the_model_lacks_are_refused(tokenizer):
    lens = fresh(tokenizer)
    for experts, message in (
        (ExpertSet.of({0: [8]}), "n_experts = 8"),
        (ExpertSet.of({5: [0]}), "layer 5 has no routed experts"),
    ):
        with pytest.raises(MoELensError, match=message), TuneExperts(experts).attached(lens):
            pass
    with pytest.raises(MoELensError, match="empty"):
        TuneExperts(ExpertSet())


def test_half_precision_experts_train_in_float32_and_keep_their_dtype(tokenizer):
    lens = MoELens.from_pretrained(build_model("olmoe", len(tokenizer)).to(torch.bfloat16), tokenizer)
    with TuneExperts(some_experts(lens)).attached(lens) as trainable:
        with training(lens.module, {name: lens.module.get_parameter(name) for name in trainable.names}):
            assert {lens.module.get_parameter(name).dtype for name in trainable.names} == {torch.float32}
        log = fit(lens.module, trainable.names, prompts(lens), SCHEDULE, pad_id=0)
    assert log.rows[-1]["loss"] < log.rows[0]["loss"]
    assert {parameter.dtype for parameter in lens.module.parameters()} == {torch.bfloat16}


def rows_of_experts(experts, selected: list[list[int]]) -> tuple[torch.Tensor, ...]:
    """Arguments of an experts module: random hidden states, these selected experts, equal weights."""
    hidden = torch.randn(len(selected), 32, generator=torch.Generator().manual_seed(0))
    return hidden, torch.tensor(selected), torch.full((len(selected), len(selected[0])), 0.5)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_experts_without_tokens_get_no_gradient_whatever_a_kernel_leaves_there(tokenizer, family, monkeypatch):
    """The stand-in does what is reported of a kernel: a group without rows gets what was in the memory."""
    right = slices._grouped_linear

    class Faulty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight, offs):
            ctx.save_for_backward(offs)
            return weight.view_as(weight)

        @staticmethod
        def backward(ctx, grad):
            (offs,) = ctx.saved_tensors
            empty = offs.diff(prepend=offs.new_zeros(1)) == 0
            return grad.masked_fill(empty.view(-1, 1, 1), torch.nan), None

    def faulty(rows, weight, offs, **options):
        return right(rows, Faulty.apply(weight, offs), offs, **options)

    lens = open_family(tokenizer, family)
    chosen = ExpertSet.of({1: [0, 5, 7]})
    experts = lens.module.get_submodule(lens.architecture.at(1).experts)
    monkeypatch.setattr(slices, "_grouped_linear", faulty)
    with TuneExperts(chosen).attached(lens) as trainable:
        experts(*rows_of_experts(experts, [[0, 1], [5, 2], [0, 5]])).square().sum().backward()
        for name in trainable.names:
            gradient = lens.module.get_parameter(name).grad
            assert not gradient[2].any()
            assert gradient[:2].flatten(1).any(-1).all()


@pytest.mark.parametrize("selected", [[[1, 2], [3, 4]], [[0, 5], [5, 7]]], ids=["no chosen expert", "only chosen ones"])
def test_a_part_without_rows_is_no_grouped_product_and_has_gradients_of_zero(tokenizer, selected, monkeypatch):
    right, parts = slices._grouped_linear, []

    def watched(rows, *arguments, **options):
        parts.append(len(rows))
        return right(rows, *arguments, **options)

    lens = open_family(tokenizer, "gpt_oss")
    experts = lens.module.get_submodule(lens.architecture.at(1).experts)
    arguments = rows_of_experts(experts, selected)
    with torch.no_grad():
        expected = experts(*arguments)
    monkeypatch.setattr(slices, "_grouped_linear", watched)
    with TuneExperts(ExpertSet.of({1: [0, 5, 7]})).attached(lens) as trainable:
        output = experts(*arguments)
        output.square().sum().backward()
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-6)
        for name in trainable.names:
            used = lens.module.get_parameter(name).grad.flatten(1).any(-1)
            assert used.tolist() == [any(expert in row for row in selected) for expert in (0, 5, 7)]
    assert parts == [len(selected) * 2] * 2
