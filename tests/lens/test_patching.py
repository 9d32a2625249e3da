"""Values and routing of another run: what is put in is what the next module gets, matched by example and position."""

from dataclasses import replace

import pytest
import torch
from conftest import left_padded, most_used

from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens import AddVector, Bias, Patch, Replay, Run, Scale, TopK, Zero

CLEAN = [
    Example("0", "The capital of Arland is Belmor.", "What is the capital of Arland?", ("Belmor",)),
    Example("1", "The cat sat on the mat.", "What sat on the mat?", ("The cat",)),
]
SHORTER = [replace(CLEAN[0], context="The dog slept."), replace(CLEAN[1], context="The dog slept in the sun.")]
DIFFERENT = ("olmoe", "qwen2_moe", "deepseek_v3")


@pytest.fixture(params=DIFFERENT)
def lens(lenses, request):
    return lenses[request.param]


def seen(lens, examples, capture, *interventions, positions="all", **options):
    """The one record of these examples under the interventions."""
    with lens.intervene(*interventions):
        [record] = lens.records(examples, capture=("routing", *capture), positions=positions, progress=False, **options)
    return record


def row(record, name, what, layer, positions):
    """What was recorded of one example at its positions."""
    place = record.ids.index(name)
    mask = record.position_mask(positions)[place][record.kept]
    return record.captured[what][layer][place][mask]


@pytest.mark.parametrize("what", ["residual", "moe_output", "router_input"])
def test_patched_values_are_those_of_the_other_run_at_the_same_words(lens, what):
    layer = 1
    own = Patch(Run(lens, SHORTER), what=what, layers=[layer], positions="question")
    theirs, patched, plain = seen(lens, SHORTER, [what]), seen(lens, CLEAN, [what], own), seen(lens, CLEAN, [what])
    for example in CLEAN:
        values = [row(record, example.id, what, layer, "question") for record in (theirs, patched, plain)]
        torch.testing.assert_close(values[1], values[0], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(values[2], values[0], atol=1e-3)
        before = [row(record, example.id, what, layer, "context") for record in (patched, plain)]
        torch.testing.assert_close(*before, rtol=1e-4, atol=1e-5)


def test_what_is_patched_in_is_what_the_next_layer_is_given(lens):
    given = []
    module = lens.module.model.layers[2]
    handle = module.register_forward_pre_hook(lambda _, args, named: given.append(args[0].clone()), with_kwargs=True)
    try:
        seen(lens, CLEAN, [], Patch(Run(lens, CLEAN, under=(Zero(used(lens)),)), layers=[1], positions="last"))
    finally:
        handle.remove()
    source, patched = given[-2:]  # the source runs first
    assert torch.equal(patched[:, -1], source[:, -1])
    assert not torch.allclose(patched[:, -2], source[:, -2], atol=1e-3)


def used(lens):
    return most_used(lens, [example.question for example in CLEAN], size=1)


def test_what_the_other_run_is_under_acts_in_it_once_and_nothing_else_does(lens):
    """Halved twice, or added twice, would be another run."""
    added = AddVector(1, torch.full((lens.architecture.d_model,), 0.5))
    for under in (Scale(used(lens), 0.5), added):
        alone = seen(lens, CLEAN, ["residual"], under)
        patched = seen(lens, CLEAN, ["residual"], Zero(used(lens)), Patch(Run(lens, CLEAN, under=(under,))))
        counted = alone.attention_mask.bool()[:, alone.kept]  # pads are not patched
        for layer, residual in alone.residual.items():
            torch.testing.assert_close(patched.residual[layer][counted], residual[counted], rtol=1e-5, atol=1e-5)


def test_patching_experts_adds_the_difference_of_what_they_add(lens):
    experts = used(lens).restrict([1])
    source = Run(lens, CLEAN, under=(Zero(used(lens).restrict([0, 1] if 0 in lens.architecture.moe_layers else [1])),))
    own = Patch(source, what="expert_outputs", experts=experts)
    captures = ["expert_outputs", "moe_output"]
    patched, plain = seen(lens, CLEAN, captures, own), seen(lens, CLEAN, captures)
    with lens.intervene(*source.under):
        theirs = seen(lens, CLEAN, captures)

    def added(record):
        routing = record.routing[1]
        weights = routing.weights * torch.isin(routing.indices, torch.tensor(experts[1]))
        return torch.einsum("bpk,bpkd->bpd", weights, record.expert_outputs[1])

    assert list(patched.ids) == list(plain.ids) == list(theirs.ids)
    scale = lens.architecture.at(1).scale_after
    change = patched.captured["moe_output"][1] - plain.captured["moe_output"][1]
    real = plain.attention_mask.bool()
    expected = scale * (added(theirs) - added(plain))
    torch.testing.assert_close(change[real], expected[real], rtol=1e-3, atol=1e-4)
    assert change.abs().max() > 1e-3


def test_a_replay_selects_what_the_other_run_selects_with_live_weights_or_its(lens):
    source = Run(lens, CLEAN, under=(Bias(used(lens), -30.0),))
    theirs = seen(lens, CLEAN, [], *source.under)
    live, whole = seen(lens, CLEAN, [], Replay(source)), seen(lens, CLEAN, [], Replay(source, weights="source"))
    plain = seen(lens, CLEAN, [])
    real = plain.attention_mask.bool()
    for layer in lens.architecture.moe_layers:
        for record in (live, whole):
            assert torch.equal(record.routing[layer].indices[real], theirs.routing[layer].indices[real])
        torch.testing.assert_close(whole.routing[layer].weights[real], theirs.routing[layer].weights[real])
        rule, routing = lens.architecture.scoring, live.routing[layer]
        torch.testing.assert_close(routing.weights, rule.weights(routing.logits, routing.indices), rtol=1e-4, atol=1e-5)
        assert not torch.equal(theirs.routing[layer].indices[real], plain.routing[layer].indices[real])


@pytest.mark.parametrize("make", [lambda run, **where: Patch(run, **where), lambda run, **where: Replay(run, **where)])
def test_positions_that_are_not_equally_many_are_refused_or_aligned(olmoe, make):
    run = Run(olmoe, SHORTER)
    with pytest.raises(MoELensError, match=r"example '\d' has \d+ positions 'context' and \d+ in the run"):
        seen(olmoe, CLEAN, [], make(run, positions="context"))
    plain = seen(olmoe, CLEAN, ["residual"])
    theirs = seen(olmoe, SHORTER, ["residual"])
    for align in ("start", "end"):
        if isinstance(own := make(run, positions="context", align=align), Replay):
            seen(olmoe, CLEAN, [], own)
            continue
        patched = seen(olmoe, CLEAN, ["residual"], replace(own, layers=(0,)))
        for example in CLEAN:
            ours, new, old = (row(r, example.id, "residual", 0, "context") for r in (patched, theirs, plain))
            shared = min(len(ours), len(new))
            part = slice(shared) if align == "start" else slice(-shared, None)
            rest = slice(shared, None) if align == "start" else slice(0, len(ours) - shared)
            torch.testing.assert_close(ours[part], new[part], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours[rest], old[rest], rtol=1e-4, atol=1e-5)
    with pytest.raises(MoELensError, match="align must be"):
        make(run, align="middle")


def test_answers_are_patched_where_the_other_run_has_them(olmoe):
    without, with_them = Run(olmoe, CLEAN, under=(Zero(used(olmoe)),)), Run(olmoe, CLEAN, (Zero(used(olmoe)),), True)
    options = {"with_answer": True}
    plain = seen(olmoe, CLEAN, ["residual"], **options)
    for run in (without, with_them):
        patched = seen(olmoe, CLEAN, ["residual"], Patch(run, layers=[2], positions="from_question"), **options)
        for example in CLEAN:
            old, new = (row(record, example.id, "residual", 2, "decode") for record in (plain, patched))
            assert torch.allclose(old, new, atol=1e-4) == (run is without)


def test_an_example_that_is_twice_in_a_batch_is_patched_in_both_rows(olmoe):
    """As evaluate has it there for each of its options."""
    own = Patch(Run(olmoe, CLEAN, under=(Zero(used(olmoe)),)), layers=[1])
    once, twice = seen(olmoe, CLEAN[:1], ["residual"], own), seen(olmoe, [CLEAN[0]] * 2, ["residual"], own)
    for place in (0, 1):
        torch.testing.assert_close(twice.residual[1][place], once.residual[1][0], rtol=1e-4, atol=1e-5)


def test_examples_that_the_other_run_lacks_or_has_twice_are_named(olmoe):
    with pytest.raises(MoELensError, match="has no example '1'"):
        seen(olmoe, CLEAN, [], Patch(Run(olmoe, CLEAN[:1])))
    with pytest.raises(MoELensError, match="matched by id"):
        Run(olmoe, [CLEAN[0], CLEAN[0]])
    with pytest.raises(MoELensError, match="a run needs examples"):
        Run(olmoe, [])


def test_a_run_that_selects_another_number_of_experts_is_no_selection_here(olmoe):
    with pytest.raises(MoELensError, match="the run that is replayed selects 2 experts per token, this one 3"):
        seen(olmoe, CLEAN, [], Replay(Run(olmoe, CLEAN, under=(TopK(2),))))


def test_assigned_outputs_of_experts_and_blocks_take_effect(lens):
    texts = [example.question for example in CLEAN]
    inputs = left_padded(lens, texts)
    experts = used(lens)
    with lens.intervene(Zero(experts)):
        expected, _ = lens.run_with_cache(texts)
    plain, _ = lens.run_with_cache(texts)
    with torch.no_grad(), lens.model.trace(**inputs):
        for layer in experts.layers:
            hit = torch.isin(lens.selected_experts[layer], torch.tensor(experts[layer]))
            lens.expert_outputs[layer] = lens.expert_outputs[layer].masked_fill(hit[..., None], 0)
        silenced = lens.model.output.logits.save()
    torch.testing.assert_close(silenced, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, plain, atol=1e-2)
    with torch.no_grad(), lens.model.trace(**inputs):
        for layer in lens.architecture.moe_layers:
            lens.expert_outputs[layer] = lens.expert_outputs[layer]
            lens.moe_output[layer] = lens.moe_output[layer]
        same = lens.model.output.logits.save()
    assert torch.equal(same, plain)
    with torch.no_grad(), lens.model.trace(**inputs):
        lens.moe_output[1] = lens.moe_output[1] * 2
        doubled = lens.layers_output[1].save()
    with torch.no_grad(), lens.model.trace(**inputs):
        block, after = lens.moe_output[1].save(), lens.layers_output[1].save()
    torch.testing.assert_close(doubled - after, block, rtol=1e-4, atol=1e-4)


def test_replacing_a_patchs_settings_keeps_its_experts(olmoe):
    own = Patch(Run(olmoe, CLEAN), what="expert_outputs", experts=ExpertSet.of({1: [2]}))
    assert replace(own, positions="last").layers == (1,)
