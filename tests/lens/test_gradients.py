"""Gradients: each effect is the derivative that finite differences of interventions, and of bare hooks, show."""

import pytest
import torch
from conftest import build_model
from limited_memory import out_of_memory_backward_beyond
from remote_models import KINDS, remote_folder

from moe_lens import Example, ExpertSet, MoELens, MoELensError
from moe_lens.architecture.tiny import tiny_model
from moe_lens.errors import NotFiniteError
from moe_lens.lens import Bias, Scale, Zero
from moe_lens.lens.gradients import answer_log_probability

EXAMPLES = [
    Example("a", "The capital of Arland is Belmor.", "What is the capital of Arland?", ("Belmor",)),
    Example("b", "The cat sat on the mat.", "Where did the cat sit?", ("on the mat", "the mat")),
    Example("c", "", "Who slept?", ("the dog",)),
]
FAST, SLOW = ("deepseek_v3", "llama4_text"), ("olmoe", "qwen2_moe", "gpt_oss", "granitemoe", "listed")
"""Sigmoid, groups, a selection bias and shared experts; scaled inputs; softmax; shared experts behind a gate; biases in
experts; fused slots; experts in a list."""
ALL = ("gate", "logit", "output")


@pytest.fixture(scope="module", params=[*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def lens(request, tokenizer, tmp_path_factory):
    if request.param == "listed":
        folder = remote_folder(tmp_path_factory.mktemp("remote") / "listed", tokenizer, KINDS["choosing"])
        lens = MoELens.from_pretrained(folder, trust_remote_code=True)
    else:
        lens = MoELens(tiny_model(request.param, vocab_size=len(tokenizer)), tokenizer)
    lens.progress = False
    return lens


def effects(lens, *kinds, examples=EXAMPLES, **more):
    """The batch's effects, by kind and layer, [batch, pos, expert], and which positions are no pads."""
    [found] = lens.gradients(examples, answer_log_probability, effects=kinds, with_answer=True, **more)
    return found.effects, found.position_mask("all")


def summed(lens, examples=EXAMPLES) -> float:
    return sum(lens.answer_log_probabilities(examples))


def central(lens, intervention, reach: float) -> float:
    """The derivative of the summed log-probabilities by the strength of an intervention, around its neutral one."""
    ends = []
    for strength in (reach, -reach):
        with lens.intervene(intervention(strength)):
            ends.append(summed(lens))
    return (ends[0] - ends[1]) / (2 * reach)


def selections(lens, *interventions):
    with lens.intervene(*interventions):
        [record] = lens.records(EXAMPLES, with_answer=True)
    return [routing.indices.sort(-1).values for routing in record.routing.values()]


@pytest.mark.parametrize(("kind", "mode"), [
    ("gate", lambda experts, by: Scale(experts, 1 + by)), ("logit", Bias),
])  # fmt: skip
def test_an_effect_is_the_derivative_by_the_factor_of_scale_or_the_alpha_of_bias(lens, kind, mode):
    """Where no selection changes on the way, since it jumps there."""
    found, mask = effects(lens, kind)
    plain, reach, compared = selections(lens), 2e-3, 0
    for layer in (lens.architecture.moe_layers[0], lens.architecture.moe_layers[-1]):
        own = found[kind][layer][mask].double().sum(0)
        for expert in own.abs().argsort(descending=True)[:2].tolist():
            experts = ExpertSet.of({layer: [expert]})
            ends = [selections(lens, mode(experts, by)) for by in (reach, -reach)]
            if all(torch.equal(mine, its) for end in ends for mine, its in zip(end, plain, strict=True)):
                measured = central(lens, lambda by, experts=experts: mode(experts, by), reach)
                assert float(own[expert]) == pytest.approx(measured, rel=2e-2, abs=5e-3)
                compared += 1
    assert compared, "a selection changed in all"


def test_a_selected_experts_gate_effect_is_its_weight_times_its_output_effect(lens):
    if lens.architecture.moe[0].no_single_outputs or lens.architecture.moe[0].no_output_of_any:
        with pytest.raises(MoELensError, match="cannot be told; take effects of 'gate' or 'logit'"):
            effects(lens, "output")
        return
    found, mask = effects(lens, "gate", "output")
    [record] = lens.records(EXAMPLES, with_answer=True)
    for layer, routing in record.routing.items():
        weights = torch.zeros_like(found["gate"][layer]).scatter(-1, routing.indices, routing.weights.float())
        whole = weights * found["output"][layer]
        assert torch.allclose(whole[mask], found["gate"][layer][mask], rtol=1e-3, atol=1e-5)
        reached = (found["gate"][layer] != 0).any(-1)
        assert (found["output"][layer][reached] != 0).all(), "only selected experts have an effect"


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_the_output_effect_of_an_expert_that_was_not_selected_is_what_adding_its_output_does(lenses, family):
    lens, example = lenses[family], EXAMPLES[:1]
    found, _ = effects(lens, "output", examples=example, progress=False)
    layer = lens.architecture.moe_layers[0]
    [record] = lens.records(example, with_answer=True, progress=False)
    unused = ~record.routing[layer].selected()[0]  # [pos, expert]
    own = found["output"][layer][0].masked_fill(~unused, 0)
    position, expert = divmod(int(own.abs().argmax()), own.shape[1])
    experts = lens.module.get_submodule(lens.architecture.at(layer).experts)

    def nudged(size: float) -> float:
        def add(module, arguments, named, output):
            hidden, *_ = (*arguments, *named.values())
            index = torch.full((len(hidden), 1), expert)
            alone = type(module).forward(module, hidden, index, torch.ones(len(hidden), 1))
            alone[torch.arange(len(hidden)) != position] = 0
            return output + size * alone

        handle = experts.register_forward_hook(add, with_kwargs=True)
        try:
            batch = record.input_ids
            with torch.no_grad():
                logits = lens.module(batch).logits.log_softmax(-1)[0]
        finally:
            handle.remove()
        answer = (record.labels[0] >= 0).nonzero()[:, 0]
        return float(sum(logits[place - 1, batch[0, place]] for place in answer.tolist()))

    assert float(own[position, expert]) == pytest.approx((nudged(1e-2) - nudged(-1e-2)) / 2e-2, rel=1e-2)


def test_only_the_positions_asked_for_get_the_output_of_every_expert(olmoe):
    [found] = olmoe.gradients(
        EXAMPLES[:2],
        answer_log_probability,
        effects=["output"],
        positions=["last"],
        with_answer=True,
        progress=False,
    )
    last = found.position_mask("last")
    for own in found.effects["output"].values():
        assert (own[last] != 0).all()
        assert not own[~last].any()


def test_batches_and_memory_change_nothing(olmoe):
    def of_each(**more):
        found = {}
        for one in olmoe.gradients(EXAMPLES, answer_log_probability, effects=ALL, with_answer=True, **more):
            mask = one.position_mask("all")
            for row, name in enumerate(one.batch.ids):
                found[name] = [own[row][mask[row]] for kind in ALL for own in one.effects[kind].values()]
        return [part for name in sorted(found) for part in found[name]]

    whole = of_each(progress=False)
    for part, same in zip(whole, of_each(batch_size=1, progress=False), strict=True):
        assert torch.allclose(part, same, atol=1e-4)
    with (
        out_of_memory_backward_beyond(1, olmoe.module.get_submodule("model.layers.1")),
        pytest.warns(UserWarning, match="going on with 1 at a time"),
    ):
        halved = of_each(progress=False)
    for part, same in zip(whole, halved, strict=True):
        assert torch.allclose(part, same, atol=1e-4)


def test_effects_are_those_of_the_model_under_what_is_in_force(olmoe):
    experts = ExpertSet.of({1: [0, 1, 2, 3]})
    with olmoe.intervene(Zero(experts), Bias(ExpertSet.of({2: [5]}), 1.5)):
        found, mask = effects(olmoe, "gate", "logit", progress=False)
        own = found["gate"][2][mask].double().sum(0)
        expert = int(own.abs().argmax())
        measured = central(olmoe, lambda by: Scale(ExpertSet.of({2: [expert]}), 1 + by), 1e-2)  # of the last layer
        assert float(own[expert]) == pytest.approx(measured, rel=5e-3)
    assert not found["gate"][1][..., :4].any()
    assert found["gate"][1][..., 4:].any()


def test_the_model_is_left_as_it_was_and_its_weights_get_no_gradient(tokenizer):
    lens = MoELens(build_model("olmoe", len(tokenizer)), tokenizer)
    frozen = next(iter(lens.module.parameters())).requires_grad_(False)
    before = lens.run_with_cache(["a dog"])[0]
    effects(lens, *ALL, progress=False)
    own = list(lens.module.parameters())
    assert all(one.grad is None for one in own)
    assert torch.equal(lens.run_with_cache(["a dog"])[0], before)
    with pytest.raises(MoELensError, match="expected one number of each of 3 examples"):
        list(lens.gradients(EXAMPLES, lambda logits, batch, places: logits.sum().detach(), progress=False))
    assert [one for one in own if not one.requires_grad] == [frozen]
    assert not lens.interventions


def test_numbers_that_are_not_finite_are_refused_by_name(tokenizer):
    lens = MoELens(build_model("olmoe", len(tokenizer)), tokenizer)
    with torch.no_grad():
        lens.module.model.layers[1].self_attn.o_proj.weight[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match="first after layer 1"):
        effects(lens, "gate", progress=False)


def test_what_is_no_effect_is_refused(olmoe):
    for wrong in (("gates",), ()):
        with pytest.raises(MoELensError, match="effects are of gate, logit, output; got"):
            list(olmoe.gradients(EXAMPLES, answer_log_probability, effects=wrong))
