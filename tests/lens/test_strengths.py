"""Interventions by strength: a neutral one is nothing bit for bit, others are what plain torch hooks make of them."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import build_model, left_padded, most_used

from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens import (
    AddVector,
    Bias,
    Force,
    LogitBias,
    MoELens,
    Patch,
    ProjectOut,
    Renormalize,
    Replay,
    Reroute,
    Rows,
    Run,
    Scale,
    SetTo,
    Steer,
    TopK,
    Zero,
    context_vectors,
    mean_values,
)
from moe_lens.statistics import LogitSpread

TEXTS = ["the cat sat on the mat", "The capital of Arland is", "a dog slept"]
EXAMPLES = [Example(str(place), "", text, ("a",)) for place, text in enumerate(TEXTS)]
DIFFERENT = ("olmoe", "qwen2_moe", "deepseek_v3")
"""Softmax, not renormalised; shared experts behind a gate; sigmoid, selection bias, groups and shared experts."""


@pytest.fixture(params=DIFFERENT)
def lens(lenses, request):
    return lenses[request.param]


@pytest.fixture
def experts(lens):
    return most_used(lens, TEXTS, size=2)


def under(lens, *interventions):
    """Logits and record of the texts under these."""
    with lens.intervene(*interventions):
        return lens.run_with_cache(TEXTS)


def recorded(lens, *interventions):
    """Logits and selected experts of the examples under these, by id."""
    with lens.intervene(*interventions):
        [record] = lens.records(EXAMPLES, capture=("routing", "logits"), positions="all", progress=False)
    return dict(zip(record.ids, record.logits, strict=True)), record


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["bias", "unbiased", "scale", "top_k", "residual", "moe_output", "router_input"])
def test_a_neutral_strength_is_nothing_bit_for_bit(lens, experts, kind):
    vector = torch.randn(lens.architecture.d_model)
    neutral = {
        "bias": Bias(experts, 0.0),
        "unbiased": Bias(experts, 0.0, weights="unbiased"),
        "scale": Scale(experts, 1.0),
        "top_k": TopK(lens.architecture.top_k),
    }
    own = neutral.get(kind) or AddVector(1, vector, 0.0, what=kind)
    assert torch.equal(under(lens, own)[0], under(lens)[0])


@pytest.mark.parametrize("weights", ["router", "sum"])
def test_forcing_what_is_selected_anyway_is_nothing(lens, weights):
    _, record = under(lens)
    for layer in lens.architecture.moe_layers:  # one text alone, of whose last token we force what it selects
        token = record.routing[layer].indices[0, -1].tolist()
        own = Force(ExpertSet.of({layer: token}), weights, positions="last")
        with lens.intervene(own):
            logits, found = lens.run_with_cache(TEXTS[:1])
        assert torch.equal(found.routing[layer].indices[0, -1], record.routing[layer].indices[0, -1])
        if weights == "router":
            assert torch.equal(logits[0], lens.run_with_cache(TEXTS[:1])[0][0])
        else:
            torch.testing.assert_close(logits[0], lens.run_with_cache(TEXTS[:1])[0][0])


@pytest.mark.parametrize("what", ["residual", "moe_output", "shared_output", "expert_outputs", "router_input"])
def test_patching_in_the_own_run_is_nothing_bit_for_bit(lens, what):
    if what == "shared_output" and lens.architecture.moe[0].shared_experts is None:
        pytest.skip("no shared experts")
    plain, _ = recorded(lens)
    assert same(plain, recorded(lens, Patch(Run(lens, EXAMPLES), what=what))[0])


@pytest.mark.parametrize("weights", ["router", "source"])
def test_replaying_the_own_run_is_nothing_bit_for_bit(lens, weights):
    plain, _ = recorded(lens)
    assert same(plain, recorded(lens, Replay(Run(lens, EXAMPLES), weights=weights))[0])


def test_a_scale_of_0_is_zero(lens, experts):
    assert torch.equal(under(lens, Scale(experts, 0.0))[0], under(lens, Zero(experts))[0])


def test_a_scale_multiplies_gating_weights_and_nothing_else(lens, experts):
    _, record = under(lens, Scale(experts.restrict(experts.layers[-1:]), -1.5))
    before, after = record.routing_before[experts.layers[-1]], record.routing[experts.layers[-1]]
    hit = torch.isin(before.indices, torch.tensor(experts[experts.layers[-1]]))
    assert hit.any()
    assert torch.equal(after.indices, before.indices)
    assert torch.equal(after.weights, before.weights * torch.where(hit, -1.5, 1.0))


@contextmanager
def decided_by(lens, rule):
    """Inside the block each router's output is what `rule` makes of its layer and logits [token, expert], by hooks."""

    def hook_on(layer):
        def hook(gate, _, output):
            logits, weights, indices = rule(layer, output[0])
            if gate.norm_topk_prob:
                weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights, indices

        return hook

    gates = {layer: lens.module.model.layers[layer].mlp.gate for layer in lens.architecture.moe_layers}
    handles = [gate.register_forward_hook(hook_on(layer)) for layer, gate in gates.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def table(experts, layer, n_experts=8):
    return torch.isin(torch.arange(n_experts), torch.tensor(experts[layer]))


def best(scores, weights, k=3):
    indices = scores.topk(k).indices
    return weights.gather(-1, indices), indices


def biased(experts, up, layer, logits):
    logits = logits + 1.7 * table(experts, layer)
    return logits, *best(logits, logits.softmax(-1))


def biased_selection(experts, up, layer, logits):
    return logits, *best(logits + 1.7 * table(experts, layer), logits.softmax(-1))


def forced(experts, up, layer, logits):
    return logits, *best(logits.masked_fill(table(experts, layer), torch.inf), logits.softmax(-1))


def rescaled(experts, up, layer, logits):
    _, weights, indices = forced(experts, up, layer, logits)
    old, _ = best(logits, logits.softmax(-1))
    return logits, weights * old.sum(-1, keepdim=True) / weights.sum(-1, keepdim=True), indices


def one_more(experts, up, layer, logits):
    return logits, *best(logits, logits.softmax(-1), 4)


def steered(experts, up, layer, logits):
    """SteerMoE's rule, as its authors state it: on log-softmax scores, before softmax and top-k."""
    scores = logits.log_softmax(-1)
    highest, lowest = scores.max(-1, keepdim=True).values, scores.min(-1, keepdim=True).values
    changed = torch.where(table(up, layer), highest + 0.01, scores)
    changed = torch.where(table(experts, layer), lowest - 0.01, changed)
    return changed, *best(changed, changed.softmax(-1))


RULES = {
    "bias": (biased, lambda experts, up: Bias(experts, 1.7)),
    "unbiased": (biased_selection, lambda experts, up: Bias(experts, 1.7, weights="unbiased")),
    "force": (forced, lambda experts, up: Force(experts)),
    "force-sum": (rescaled, lambda experts, up: Force(experts, "sum")),
    "top_k": (one_more, lambda experts, up: TopK(4)),
    "steer": (steered, lambda experts, up: Steer(up, experts)),
}


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
@pytest.mark.parametrize("name", RULES)
def test_routers_decide_by_the_rule_as_plain_hooks_make_them(lenses, family, name):
    lens, (rule, make) = lenses[family], RULES[name]
    experts = most_used(lens, TEXTS, size=2)
    up = most_used(lens, TEXTS, size=8) - most_used(lens, TEXTS, size=7)
    logits, _ = under(lens, make(experts, up))
    with decided_by(lens, partial(rule, experts, up)), torch.no_grad():
        expected = lens.module(**left_padded(lens, TEXTS), use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert (expected - under(lens)[0]).abs().max() > 1e-2


def test_biases_of_every_expert_are_those_of_sets_together(olmoe):
    first, second = ExpertSet.of({0: [1, 2], 1: [3]}), ExpertSet.of({1: [3, 4]})
    biases = {0: 2.0 * table(first, 0), 1: 2.0 * table(first, 1) - 0.5 * table(second, 1)}
    expected = under(olmoe, Bias(first, 2.0), Bias(second, -0.5))[0]
    assert torch.equal(under(olmoe, LogitBias(biases))[0], expected)
    with pytest.raises(MoELensError, match=r"expected 8 biases in each layer, one for each; not in \[1\]"):
        under(olmoe, LogitBias({1: torch.ones(7)}))


def test_biases_by_the_spread_of_each_layers_logits(olmoe):
    experts = most_used(olmoe, TEXTS, size=2)
    [spread] = olmoe.measure(TEXTS, LogitSpread(), progress=False)
    own = Bias(experts, 2.0, sd=spread.sd())
    _, record = under(olmoe, own)
    plain = under(olmoe)[1]
    real = plain.attention_mask.bool()
    for layer in experts.layers:
        logits = plain.routing[layer].logits[real]
        sd = (logits - logits.mean(-1, keepdim=True)).square().mean().sqrt()
        assert spread.sd()[layer] == pytest.approx(float(sd), rel=1e-5)
        moved = record.routing[layer].logits - record.routing_before[layer].logits
        expected = 2 * sd * table(experts, layer)
        torch.testing.assert_close(moved, expected.expand(moved.shape), rtol=1e-4, atol=1e-5)


def test_a_saturated_router_is_said(tokenizer):
    model = build_model("olmoe", len(tokenizer))
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.mul_(1000)
    [spread] = MoELens(model, tokenizer).measure(TEXTS, LogitSpread(), progress=False)
    with pytest.warns(UserWarning, match=r"above 0.99 in layers \[1\]"):
        spread.sd()
    with pytest.raises(MoELensError, match=r"above 0 of the logits of layers \[2\]"):
        Bias(ExpertSet.of({1: [0], 2: [0]}), 1.0, sd={1: 1.0})


def test_adding_and_projecting_are_their_formulas_on_the_next_modules_input(lens):
    width, layer = lens.architecture.d_model, 1
    generator = torch.Generator().manual_seed(0)
    vector, directions = torch.randn(width, generator=generator), torch.randn(2, width, generator=generator)
    plain = lens.run_with_cache(TEXTS, capture=("residual",))[1].residual[layer]
    unit = torch.linalg.qr(directions.T).Q
    for own, expected in (
        (AddVector(layer, vector, 2.5), plain + 2.5 * vector),
        (ProjectOut(directions, layers=[layer]), plain - plain @ unit @ unit.T),
        (SetTo({layer: vector}), vector.expand(plain.shape)),
    ):
        with lens.intervene(own), next_input(lens, layer) as given:
            lens.run_with_cache(TEXTS)
        torch.testing.assert_close(given[0], expected, rtol=1e-4, atol=1e-5)


@contextmanager
def next_input(lens, layer):
    """What the layer after this one is given, seen by a plain hook."""
    seen = []
    after = lens.module.model.layers[layer + 1]
    handle = after.register_forward_pre_hook(lambda _, args, named: seen.append(args[0]), with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def test_mean_ablation_puts_in_the_mean_over_the_positions(olmoe):
    found = mean_values(olmoe, EXAMPLES, what="moe_output", positions="question")
    [record] = olmoe.records(EXAMPLES, capture=("moe_output",), positions="question", progress=False)
    mask = record.kept_mask("question")
    torch.testing.assert_close(found[1], record.captured["moe_output"][1][mask].mean(0))
    with pytest.raises(MoELensError, match="no position 'context'"):
        mean_values(olmoe, EXAMPLES, positions="context")


def test_the_vector_of_a_context_is_what_it_adds_at_the_last_token_on_average(olmoe):
    asked = [replace(one, context=f"{text} and more.") for one, text in zip(EXAMPLES, TEXTS[::-1], strict=True)]
    for what in ("residual", "moe_output"):
        found = context_vectors(olmoe, asked, what=what)
        assert list(found) == list(range(olmoe.architecture.n_layers))
        alone = []
        for example in (*asked, *EXAMPLES):  # one by one, so that the last token is the last position
            [record] = olmoe.records([example], capture=(what,), positions="all", progress=False)
            alone.append(record.captured[what][1][0, -1])
        expected = torch.stack(alone[:3]).mean(0) - torch.stack(alone[3:]).mean(0)
        torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(MoELensError, match="example '1' has no context to leave out"):
        context_vectors(olmoe, [asked[0], EXAMPLES[1]])


def test_scaled_is_so_many_times_the_strength_at_the_same_place(olmoe):
    experts, vector = ExpertSet.of({1: [2]}), torch.ones(olmoe.architecture.d_model)
    bias = LogitBias({1: torch.arange(8.0)}, weights="unbiased", steps="prefill")
    assert Bias(experts, 3.0, positions="last").scaled(2) == Bias(experts, 6.0, positions="last")
    assert AddVector(1, vector, 0.5, what="moe_output").scaled(-2) == AddVector(1, vector, -1.0, what="moe_output")
    doubled = LogitBias({1: 2 * torch.arange(8.0)}, weights="unbiased", steps="prefill")
    assert bias.scaled(2) == doubled
    with pytest.raises(MoELensError, match="Reroute has no strength"):
        Reroute(experts).scaled(2)


def test_kinds_on_the_router_act_together_before_it_selects_and_those_on_gating_after(olmoe):
    experts = most_used(olmoe, TEXTS, size=3)
    first, second, third = (ExpertSet.of({layer: [experts[layer][n]] for layer in experts.layers}) for n in range(3))
    together = under(olmoe, Scale(second, 0.5), Bias(first, -3.0), Zero(third), Bias(second, 2.0))[0]
    assert torch.equal(together, under(olmoe, Bias(second, 2.0), Bias(first, -3.0), Scale(second, 0.5), Zero(third))[0])
    doubled, rescaled = Scale(first, 2.0), Renormalize(second)
    outer_first, record = under(olmoe, doubled, rescaled)
    assert not torch.equal(outer_first, under(olmoe, rescaled, doubled)[0])
    before, after = (routing[0] for routing in (record.routing_before, record.routing))
    one, two = (torch.isin(before.indices, torch.tensor(part[0])) for part in (first, second))
    weights = before.weights * torch.where(one, 2.0, 1.0)
    kept = weights.masked_fill(two, 0)
    expected = kept * weights.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True)
    torch.testing.assert_close(after.weights, expected)


E_1, E_2 = ExpertSet.of({1: [2]}), ExpertSet.of({1: [2, 3, 4, 5]})


@pytest.mark.parametrize(
    ("several", "said"),
    [
        ([Force(E_1), Reroute(E_1)], r"experts \[2\] of layer 1 are forced and rerouted at once"),
        ([Force(E_2)], "4 experts are forced in layer 1, where a token gets 3"),
        ([Force(E_2 - E_1), TopK(2)], "3 experts are forced in layer 1, where a token gets 2"),
        ([Force(E_2), TopK(5, positions="last")], "4 experts are forced in layer 1, where a token gets 3"),
        ([Reroute(E_2), TopK(5)], "leaves 4 experts, fewer than the 5"),
        ([Rows((Force(E_1),)), Rows((None, None))], r"Rows of different lengths cannot act together; got \[1, 2\]"),
        ([TopK(9)], "at most 8"),
    ],
)
def test_contradictions_are_refused(olmoe, several, said):
    with pytest.raises(MoELensError, match=said), olmoe.intervene(*several):
        pass
    assert olmoe.interventions == ()


def test_more_can_be_forced_where_all_tokens_get_more(olmoe):
    _, record = under(olmoe, Force(E_2), TopK(5))
    assert all((record.routing[1].indices == expert).any(-1).all() for expert in E_2[1])


@pytest.mark.parametrize("other", [Force(E_1), Reroute(E_1), TopK(2, layers=[1])], ids=lambda own: type(own).__name__)
def test_a_replay_and_what_selects_otherwise_are_refused_in_one_row_and_layer_but_not_apart(olmoe, other):
    replay = Replay(Run(olmoe, EXAMPLES))
    rows = Rows((replay, other, None))
    for several in ([replay, other], [rows, other], [Rows((replay, other, None)), Rows((other, None, None))]):
        with pytest.raises(MoELensError, match="layer 1 cannot get the selection of another run and"):
            recorded(olmoe, *several)
    recorded(olmoe, rows)
    recorded(olmoe, Replay(Run(olmoe, EXAMPLES), layers=[0]), replace(other, layers=(1,)))


def test_groups_limit_how_many_experts_a_token_can_get(lenses):
    with pytest.raises(MoELensError, match="2 of 4 groups of 4 experts; expected k of at most"):
        under(lenses["deepseek_v3"], TopK(9))
    _, record = under(lenses["deepseek_v3"], TopK(8))
    assert record.routing[1].indices.shape[-1] == 8


@pytest.mark.parametrize(
    "make",
    [
        lambda: Bias(E_1, float("inf")),
        lambda: Bias(E_1, 1.0, weights="none"),
        lambda: LogitBias({1: torch.full((8,), torch.inf)}),
        lambda: LogitBias({}),
        lambda: Scale(E_1, float("nan")),
        lambda: Force(E_1, "none"),
        lambda: TopK(0),
        lambda: Steer(E_1, E_2),
        lambda: Steer(),
        lambda: Steer(E_1, epsilon=0.0),
        lambda: AddVector(1, torch.ones(2, 2)),
        lambda: AddVector(1, torch.ones(2), layers=[2]),
        lambda: ProjectOut(torch.ones(2, 4)),
        lambda: SetTo({}),
        lambda: AddVector(1, torch.ones(4), what="attention"),
    ],
)
def test_what_means_nothing_is_refused_when_it_is_made(make):
    with pytest.raises(MoELensError):
        make()
