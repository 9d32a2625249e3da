"""Zero, Renormalize and Reroute against physical surgery on the model, alone, per row and together."""

import copy

import pytest
import torch
from conftest import SELECTION_BIAS_FAMILIES, build_model, left_padded, most_used
from transformers import AutoModelForCausalLM

from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens.interventions import MODES, Bias, Renormalize, Reroute, Rows, Zero
from moe_lens.lens.lens import MoELens
from moe_lens.routing import Routing

TEXTS = ["the cat sat on the mat", "The capital of Arland is", "a dog slept"]


def unwrapped(module, dtype=torch.float32):
    """A copy of the model that no tracing library has touched."""
    fresh = AutoModelForCausalLM.from_config(copy.deepcopy(module.config), dtype=dtype).eval()
    fresh.load_state_dict(module.state_dict())
    return fresh


def with_zeroed_down_proj(module, experts):
    """A copy of the model in which these experts output nothing."""
    changed = unwrapped(module, module.dtype)
    with torch.no_grad():
        for layer, expert in experts:
            changed.model.layers[layer].mlp.experts.down_proj[expert] = 0
    return changed


def without_experts(module, layer, gone):
    """A copy of the model without some experts of a layer: no router rows, biases or weights for them."""
    changed = unwrapped(module, module.dtype)
    mlp = changed.model.layers[layer].mlp
    n_experts = mlp.gate.weight.shape[0]
    kept = [expert for expert in range(n_experts) if expert not in gone]
    with torch.no_grad():
        for part in (mlp.gate, mlp.experts):
            for name, tensor in [*part.named_parameters(), *part.named_buffers()]:
                if tensor.ndim and tensor.shape[0] == n_experts:
                    cut = tensor[kept].clone()
                    setattr(part, name, torch.nn.Parameter(cut) if name in part._parameters else cut)
            part.num_experts = len(kept)
    return changed


def bare_logits(module, lens, texts=TEXTS):
    with torch.no_grad():
        return module(**left_padded(lens, texts)).logits


def real(lens, logits, texts=TEXTS):
    """The logits at positions that are not pads, [token, vocab]."""
    return logits[left_padded(lens, texts)["attention_mask"].bool()]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_zero_equals_a_zeroed_down_proj_bit_for_bit(lens, implementation):
    experts = most_used(lens, TEXTS, size=2)
    default = lens.module.config._experts_implementation
    lens.module.set_experts_implementation(implementation)
    try:
        surgery = bare_logits(with_zeroed_down_proj(lens.module, experts), lens)
        unmasked = bare_logits(lens.module, lens)
        with lens.intervene(Zero(experts)):
            logits, _ = lens.run_with_cache(TEXTS)
    finally:
        lens.module.set_experts_implementation(default)
    assert torch.equal(logits, surgery)
    assert (real(lens, logits) - real(lens, unmasked)).abs().max() > 1e-2


def test_zero_in_bfloat16_equals_a_zeroed_down_proj_bit_for_bit(lenses, tokenizer):
    lens = MoELens(unwrapped(lenses["qwen3_moe"].module, torch.bfloat16), tokenizer)
    experts = most_used(lens, TEXTS, size=2)
    surgery = bare_logits(with_zeroed_down_proj(lens.module, experts), lens)
    with lens.intervene(Zero(experts)):
        assert torch.equal(lens.run_with_cache(TEXTS)[0], surgery)


def test_reroute_equals_deleting_the_experts(lens, family):
    layer = lens.architecture.moe_layers[-1]
    # Where groups limit the choice, deletion keeps groups of equal size only if it takes one from each.
    gone = (1, 6, 11, 12) if lens.architecture.groups else most_used(lens, TEXTS, size=2)[layer]
    surgery = real(lens, bare_logits(without_experts(lens.module, layer, gone), lens))
    unmasked = real(lens, bare_logits(lens.module, lens))
    with lens.intervene(Reroute(ExpertSet.of({layer: gone}))):
        logits, record = lens.run_with_cache(TEXTS)
    torch.testing.assert_close(real(lens, logits), surgery, rtol=1e-5, atol=1e-5)
    assert (surgery - unmasked).abs().max() > 1e-2
    assert not torch.isin(record.routing[layer].indices, torch.tensor(gone)).any()
    assert torch.isin(record.routing_before[layer].indices, torch.tensor(gone)).any()


@pytest.mark.parametrize("name", SELECTION_BIAS_FAMILIES)
def test_reroute_removes_experts_that_the_selection_bias_favours(lenses, name):
    lens, layer, gone = lenses[name], 2, (1, 6, 11, 12)
    bias = lens.module.model.layers[layer].mlp.gate.e_score_correction_bias
    old = bias.clone()
    bias[[1, 6]] = 50.0  # so that every token would choose these, and their groups
    try:
        surgery = real(lens, bare_logits(without_experts(lens.module, layer, gone), lens))
        with lens.intervene(Reroute(ExpertSet.of({layer: gone}))):
            logits, record = lens.run_with_cache(TEXTS)
    finally:
        bias.copy_(old)
    before, after = record.routing_before[layer], record.routing[layer]
    assert (before.indices == 1).any(-1).all()
    assert not torch.isin(after.indices, torch.tensor(gone)).any()
    assert (after.weights > 0).all()
    torch.testing.assert_close(real(lens, logits), surgery, rtol=1e-5, atol=1e-5)


def test_renormalize_keeps_each_tokens_sum(lens):
    experts = most_used(lens, TEXTS, size=2)
    with lens.intervene(Renormalize(experts)):
        _, record = lens.run_with_cache(TEXTS)
    for layer in experts.layers:
        before, after = record.routing_before[layer], record.routing[layer]
        hit = torch.isin(before.indices, torch.tensor(experts[layer]))
        rest = before.weights.masked_fill(hit, 0)
        assert hit.any()
        assert (after.weights[hit] == 0).all()
        left = rest.sum(-1, keepdim=True)
        expected = rest * before.weights.sum(-1, keepdim=True) / left
        torch.testing.assert_close(after.weights, torch.where(left > 0, expected, 0.0))


def test_renormalize_gives_zeros_where_all_selected_experts_are_masked():
    routing = Routing(torch.zeros(1, 1, 4), torch.tensor([[[0, 1]]]), torch.tensor([[[0.6, 0.4]]]))
    masked = Renormalize(ExpertSet.of({0: [0, 1]})).edited(routing, torch.ones(1, 1, 2, dtype=torch.bool))
    assert masked.weights.tolist() == [[[0.0, 0.0]]]


def test_the_record_shows_what_zero_did(lens):
    experts = most_used(lens, TEXTS, size=1)
    untouched = ExpertSet.of({experts.layers[-1]: experts[experts.layers[-1]]})
    with lens.intervene(Zero(untouched)):
        _, record = lens.run_with_cache(TEXTS)
    *others, layer = lens.architecture.moe_layers
    before, after = record.routing_before[layer], record.routing[layer]
    hit = torch.isin(before.indices, torch.tensor(untouched[layer]))
    assert torch.equal(before.indices, after.indices)
    assert torch.equal(after.weights, before.weights.masked_fill(hit, 0))
    assert (before.weights[hit] > 0).all()
    for other in others:
        assert record.routing[other] is record.routing_before[other]


def test_each_row_has_its_own_intervention(lens):
    experts = most_used(lens, TEXTS, size=2)
    layer = lens.architecture.moe_layers[0]
    rows = Rows((Zero(experts), None, Reroute(experts.restrict([layer]))))
    with lens.intervene(rows):
        logits, _ = lens.run_with_cache(TEXTS)
    for row, own in enumerate(rows.interventions):
        with lens.intervene(*([] if own is None else [own])):
            alone, _ = lens.run_with_cache(TEXTS)
        torch.testing.assert_close(logits[row], alone[row], rtol=1e-5, atol=1e-5)


def test_rows_follow_their_examples_through_length_bucketing(lens):
    experts = most_used(lens, TEXTS, size=3)
    own = (None, Zero(experts), None, Zero(experts), None)
    texts = ["a", "the cat sat", "The capital of Arland is Belmor", "the dog slept in the sun", "on"]
    with lens.intervene(Rows(own)):
        together = lens.generate(texts, max_new_tokens=4, batch_size=2, progress=False)
        seen = {
            name: any((routing.weights[row] == 0).any() for routing in record.routing.values())
            for record in lens.records(texts, batch_size=2, progress=False)
            for row, name in enumerate(record.ids)
        }
    for place, intervention in enumerate(own):
        with lens.intervene(*([intervention] if intervention else [])):
            assert lens.generate([texts[place]], max_new_tokens=4, progress=False) == [together[place]]
        assert seen[str(place)] == (intervention is not None)


def test_blocks_nest_and_leave_what_was_there(lens):
    used = most_used(lens, TEXTS, size=3)
    first = ExpertSet.of({layer: used[layer][:2] for layer in used.layers[:-1]})
    second = used - first
    plain, _ = lens.run_with_cache(TEXTS)
    with lens.intervene(Zero(first)):
        outer, _ = lens.run_with_cache(TEXTS)
        with lens.intervene(Zero(second)):
            both, _ = lens.run_with_cache(TEXTS)
        assert torch.equal(lens.run_with_cache(TEXTS)[0], outer)
    with lens.intervene(Zero(first | second)):
        union, _ = lens.run_with_cache(TEXTS)
    assert torch.equal(both, union)
    assert not torch.equal(outer, plain)
    assert not torch.equal(both, outer)
    assert torch.equal(lens.run_with_cache(TEXTS)[0], plain)


def test_nested_blocks_on_a_layer_record_what_was_before_all_of_them(lens):
    used = most_used(lens, TEXTS, size=2)
    layer = lens.architecture.moe_layers[0]
    _, plain = lens.run_with_cache(TEXTS)
    with lens.intervene(Zero(used.restrict([layer]))), lens.intervene(Reroute(used.restrict([layer]))):
        _, record = lens.run_with_cache(TEXTS)
    before = record.routing_before[layer]
    assert torch.equal(before.logits, plain.routing[layer].logits)
    assert torch.equal(before.indices, plain.routing[layer].indices)
    assert torch.equal(before.weights, plain.routing[layer].weights)


def test_reroutes_add_up(lens):
    first, second = ExpertSet.of({2: [0, 4]}), ExpertSet.of({2: [2]})
    with lens.intervene(Reroute(first), Reroute(second)):
        both, _ = lens.run_with_cache(TEXTS)
    with lens.intervene(Reroute(first | second)):
        assert torch.equal(lens.run_with_cache(TEXTS)[0], both)


def test_an_exception_in_the_block_leaves_no_intervention(lens):
    plain, _ = lens.run_with_cache(TEXTS)
    masked = []

    def work_and_fail():
        with lens.intervene(Zero(most_used(lens, TEXTS, size=2))):
            masked.append(lens.run_with_cache(TEXTS)[0])
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        work_and_fail()
    assert not torch.equal(masked[0], plain)
    assert torch.equal(lens.run_with_cache(TEXTS)[0], plain)
    assert torch.equal(bare_logits(lens.module, lens), plain)


def test_an_exception_inside_a_running_trace_leaves_no_intervention(lens):
    plain, _ = lens.run_with_cache(TEXTS)
    for own in (Zero(ExpertSet.of({2: [0]})), Bias(ExpertSet.of({2: [0]}), 1.0)):
        with lens.intervene(Rows((own,))), pytest.raises(MoELensError, match="Rows has 1 for a batch of 3"):
            lens.run_with_cache(TEXTS)
    logits, record = lens.run_with_cache(TEXTS)
    assert torch.equal(logits, plain)
    assert all(record.routing[layer] is record.routing_before[layer] for layer in record.routing)


def test_the_users_own_edits_survive_the_block(olmoe):
    with olmoe.model.edit(inplace=True):
        olmoe.layers_output[0] = olmoe.layers_output[0] * 0
    try:
        edited, _ = olmoe.run_with_cache(TEXTS)
        with olmoe.intervene(Zero(ExpertSet.of({1: [0]}))):
            pass
        assert torch.equal(olmoe.run_with_cache(TEXTS)[0], edited)
    finally:
        olmoe.model.clear_edits()


def test_reroute_refuses_to_leave_too_few_experts(olmoe):
    with (
        pytest.raises(MoELensError, match="layer 1 leaves 2 experts, fewer than the 3"),
        olmoe.intervene(Reroute(ExpertSet.of({1: range(6)}))),
    ):
        pass
    with olmoe.intervene(Reroute(ExpertSet.of({1: range(5)}))):
        _, record = olmoe.run_with_cache(TEXTS)
    assert set(record.routing[1].indices.flatten().tolist()) == {5, 6, 7}


def test_nested_reroutes_are_refused_together(olmoe):
    with (
        olmoe.intervene(Reroute(ExpertSet.of({1: range(5)}))),
        pytest.raises(MoELensError, match="leaves 2 experts"),
        olmoe.intervene(Reroute(ExpertSet.of({1: [5]}))),
    ):
        pass


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_reroute_counts_experts_in_the_groups_a_token_may_choose(lenses, name):
    lens = lenses[name]  # four groups of four experts, of which a token may choose two; top-3
    two_groups_with_one_left = ExpertSet.of({1: [0, 1, 2, 4, 5, 6]})
    with (
        pytest.raises(MoELensError, match="leaves 2 experts in some 2 of its 4 groups"),
        lens.intervene(Reroute(two_groups_with_one_left)),
    ):
        pass
    with lens.intervene(Reroute(ExpertSet.of({1: [0, 1, 2, 4, 5]}))):
        _, record = lens.run_with_cache(TEXTS)
    assert not torch.isin(record.routing[1].indices, torch.tensor([0, 1, 2, 4, 5])).any()


def test_reroute_refuses_a_router_it_cannot_follow(tokenizer):
    model = build_model("olmoe", len(tokenizer))

    class SortingRouter(type(model.model.layers[0].mlp.gate)):
        def forward(self, hidden_states):
            logits = torch.nn.functional.linear(hidden_states, self.weight)
            weights, indices = logits.softmax(-1).sort(descending=True)
            return logits, weights[:, : self.top_k], indices[:, : self.top_k]

    for layer in model.model.layers:
        layer.mlp.gate.__class__ = SortingRouter
    lens = MoELens(model, tokenizer)
    with lens.intervene(Reroute(ExpertSet.of({1: [0]}))), pytest.raises(MoELensError, match="cannot change what"):
        lens.run_with_cache(TEXTS)


@pytest.mark.parametrize("kind", MODES.values(), ids=MODES)
def test_unknown_layers_and_experts_are_named(lenses, kind):
    lens = lenses["deepseek_v2"]
    with (
        pytest.raises(MoELensError, match="layer 0 has no routed experts"),
        lens.intervene(kind(ExpertSet.of({0: [1]}))),
    ):
        pass
    with (
        pytest.raises(MoELensError, match=r"layer 1 has experts 0 to 15; got \[16\]"),
        lens.intervene(Rows((None, kind(ExpertSet.of({1: [3, 16]}))))),
    ):
        pass


def test_rows_refuse_more_examples_than_they_have(olmoe):
    with (
        olmoe.intervene(Rows((Zero(ExpertSet.of({1: [0]})),))),
        pytest.raises(MoELensError, match="one per example"),
    ):
        olmoe.generate(TEXTS, progress=False)


def test_experts_alone_are_told_what_to_make_of_them(olmoe):
    experts = ExpertSet.of({1: [2]})
    said = (
        r"got experts, '1:2', without what to do to them; .* such as Zero\(experts\), Renormalize\(experts\) or Reroute"
    )
    with pytest.raises(MoELensError, match=said), olmoe.intervene(experts):
        pass
    with (
        pytest.raises(MoELensError, match=r"expected an intervention such as Zero\(experts\); got '1:2'"),
        olmoe.intervene("1:2"),
    ):
        pass
    with pytest.raises(MoELensError, match=r"expected an ExpertSet, such as .*; got \{1: \[2\]\}"):
        Zero({1: [2]})
    assert olmoe.interventions == ()


def test_the_interventions_in_force_can_be_read(olmoe):
    outer, inner = Zero(ExpertSet.of({1: [2]})), Reroute(ExpertSet.of({2: [3]}))
    with olmoe.intervene(outer) as given, olmoe.intervene(inner):
        assert given is olmoe
        assert olmoe.interventions == (outer, inner)
    assert olmoe.interventions == ()
