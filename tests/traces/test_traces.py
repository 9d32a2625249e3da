"""Traces of serving engines: each format read to what the model did, statistics as of a run, and all else refused."""

import base64
import io
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from moe_lens import MoELens, MoELensError, load_examples
from moe_lens.architecture.tiny import tiny_model, tiny_tokenizer
from moe_lens.choosing import SCORES
from moe_lens.choosing.measuring import Models, score_tables
from moe_lens.data import Encoded
from moe_lens.lens import Replay
from moe_lens.rows_on_disk import growing_table
from moe_lens.statistics import (
    ActivationRates,
    CoActivation,
    ExpertPaths,
    ExpertUsage,
    LogitSpread,
    RouterLoad,
    RoutingTokens,
    RoutingVectors,
    SelectedExperts,
    TokenBaseline,
    TopContexts,
    VocabularySpecialisation,
)
from moe_lens.traces import Request, TracedModel, TraceRun, read_requests, trace_agreement

EXAMPLES = load_examples("swap", limit=6)
GENERATED = [7, 9, 11]
"""Tokens put after each prompt, of which an engine does not run the last."""


@pytest.fixture(scope="module")
def lens():
    return MoELens.from_pretrained("organism")


@pytest.fixture(scope="module")
def model():
    return TracedModel.from_pretrained("organism")


@pytest.fixture(scope="module")
def served(lens):
    """What an engine would tell of each prompt with the generated tokens: by id its ids and experts [token, layer, k].

    From the bare model, under plain hooks at the experts' input.
    """
    found = {}
    for record in lens.records(EXAMPLES, batch_size=1, progress=False):
        ids = record.input_ids[0].tolist() + GENERATED
        seen = []

        def see(module, inputs, named, seen=seen):
            seen.append((*inputs, *named.values())[1])

        hooks = [
            lens.module.get_submodule(site.experts).register_forward_pre_hook(see, with_kwargs=True)
            for site in lens.architecture.moe
        ]
        with torch.no_grad():
            lens.module(input_ids=torch.tensor([ids[:-1]]), use_cache=False)
        for hook in hooks:
            hook.remove()
        found[record.ids[0]] = ids, torch.stack(seen, 1).numpy().astype(np.int32)
    return found


def npy(experts: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, experts)
    return base64.b64encode(file.getvalue()).decode()


def bare(experts: np.ndarray) -> str:
    return base64.b64encode(experts.astype("<i4").tobytes()).decode()


def logprobs(ids):
    return [[-0.5, token, None] for token in ids]


RESPONSES = {
    "offline": lambda name, prompt, said, experts: {
        "request_id": name, "prompt_token_ids": prompt, "token_ids": said, "routed_experts": experts.tolist(),
    },
    "completions": lambda name, prompt, said, experts: {
        "id": name, "prompt_token_ids": prompt, "prompt_routed_experts": experts[: len(prompt)].tolist(),
        "choices": [{"token_ids": said, "routed_experts": experts[len(prompt) :].tolist()}],
    },
    "generate": lambda name, prompt, said, experts: {
        "request_id": name, "prompt_token_ids": prompt,
        "choices": [{"token_ids": said, "routed_experts": npy(experts)}],
    },
    "meta_info": lambda name, prompt, said, experts: {
        "text": "…", "output_ids": said,
        "meta_info": {"id": name, "input_token_logprobs": logprobs(prompt), "routed_experts": bare(experts)},
    },
    "sglext": lambda name, prompt, said, experts: {
        "id": name, "input_ids": prompt, "choices": [{"token_ids": said}], "sglext": {"routed_experts": bare(experts)},
    },
}  # fmt: skip


def write_lines(path, objects):
    path.write_text("".join(json.dumps(one) + "\n" for one in objects))
    return path


def responses(served, kind="generate", **changes):
    return [RESPONSES[kind](name, ids[:-3], ids[-3:], experts) | changes for name, (ids, experts) in served.items()]


@pytest.fixture(scope="module")
def trace(served, tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("traces") / "served.jsonl", responses(served))


@pytest.fixture(scope="module")
def requests(model, trace):
    return model.read(trace, EXAMPLES)


@pytest.mark.parametrize("kind", RESPONSES)
def test_each_engines_responses_are_read_to_what_the_model_did(kind, model, served, tmp_path):
    found = model.read(write_lines(tmp_path / "a.jsonl", responses(served, kind)))
    assert [one.id for one in found] == list(served)
    for one in found:
        ids, experts = served[one.id]
        assert list(one.tokens) == ids
        assert one.prompt_length == len(ids) - 3
        assert (one.experts == experts).all()


def test_a_tracers_records_are_read_step_by_step(model, served, tmp_path):
    records = [
        {"step": step, "stage": "pre_dispatch", "block": block, "layer": layer, "rank": 0,
         "num_tokens": len(experts), "topk": 4, "top_indices": experts[:, layer].tolist()}
        for step, (_, experts) in enumerate(served.values())
        for block, layers in (("mtp", [0]), ("decoder", range(4)))
        for layer in layers
    ]  # fmt: skip
    found = model.read(write_lines(tmp_path / "router_trace_rank0.jsonl", records))
    assert [one.id for one in found] == [f"rank0-step{n}" for n in range(len(served))]
    for one, (_, experts) in zip(found, served.values(), strict=True):
        assert (one.experts == experts).all()
    with pytest.raises(MoELensError, match="tells no token ids"):
        model.measure(found, VocabularySpecialisation())
    with pytest.raises(MoELensError, match="tells no token ids"):
        model.read(tmp_path / "router_trace_rank0.jsonl", EXAMPLES)
    with pytest.raises(MoELensError, match="expected \\[0, 1, 2, 3\\], equally many"):
        model.read(write_lines(tmp_path / "b.jsonl", records[:-1]))


def activations(experts, ubatch=5, last=True):
    """`layer,expert` for every selection, as a run in parts of some tokens leaves them."""
    rows = []
    for start in range(0, len(experts), ubatch):
        part = experts[start : start + ubatch]
        for layer in range(experts.shape[1]):
            own = part if last or layer < experts.shape[1] - 1 else part[-1:]
            rows += [(layer, expert) for expert in own[:, layer].flatten()]
    return "".join(f"{layer},{expert}\n" for layer, expert in rows)


def test_a_table_of_activations_is_read_in_the_order_of_the_run(model, served, tmp_path):
    _, experts = next(iter(served.values()))
    path = tmp_path / "moe_trace.csv"
    path.write_text(activations(experts))
    [found] = model.read(path)
    assert (found.experts == experts).all()
    path.write_text(activations(experts, last=False))
    with pytest.warns(UserWarning, match="the last layer was run at"):
        [found] = model.read(path)
    assert found.layers == (0, 1, 2)
    assert (found.experts == experts[:, :3]).all()
    path.write_text(activations(experts).rsplit("\n", 3)[0])
    with pytest.raises(MoELensError, match="truncated"):
        model.read(path)


def test_a_dump_of_whole_sorted_lists_is_refused(model, tmp_path):
    """What reading a strided view flatly gives: for every 4 tokens all 16 experts once."""
    rng = np.random.default_rng(0)
    lists = np.stack([np.concatenate([rng.permutation(16) for _ in range(6)]) for _ in range(4)], 1)
    path = tmp_path / "gaps.csv"
    path.write_text(activations(lists.reshape(6, 4, 4, 4).transpose(0, 1, 3, 2).reshape(24, 4, 4), ubatch=24))
    with pytest.raises(MoELensError, match="as no router does"):
        model.read(path)


def test_our_own_rows_are_a_trace_with_weights_and_margins(lens, model, tmp_path):
    rows = RoutingTokens()
    [record] = lens.measure(EXAMPLES, rows, progress=False)
    with growing_table(tmp_path / "routing.parquet", {}) as file:
        file.add(record.table())
    found = {one.id: one for one in model.read(tmp_path / "routing.parquet", EXAMPLES)}
    for own in lens.records(EXAMPLES, batch_size=1, progress=False):
        for place, routing in enumerate(own.routing.values()):
            experts, weights = routing.ranked()
            assert found[own.ids[0]].experts[:, place].tolist() == experts[0].tolist()
            np.testing.assert_allclose(found[own.ids[0]].weights[:, place], weights[0], rtol=1e-4)
            best = routing.logits[0].sort(-1, descending=True).values
            np.testing.assert_allclose(found[own.ids[0]].margins[:, place], best[:, 3] - best[:, 4], atol=1e-5)
    [usage] = model.measure(list(found.values()), ExpertUsage(value="gating_weight"))
    [mine] = lens.measure(EXAMPLES, ExpertUsage(value="gating_weight"), progress=False)
    pd.testing.assert_frame_equal(usage.table(), mine.table(), rtol=1e-5)
    with growing_table(tmp_path / "last.parquet", {}) as file:
        file.add(record.table().query("position > 3"))
    with pytest.raises(MoELensError, match="has not all of its tokens"):
        model.read(tmp_path / "last.parquet")


COUNTED = [
    lambda at: ExpertUsage(positions=at),
    lambda at: ExpertUsage("token", at),
    CoActivation,
    ExpertPaths,
    TokenBaseline,
    lambda at: RoutingVectors(positions=at),
    lambda at: VocabularySpecialisation(positions=at),
]


@pytest.mark.parametrize("positions", ["all", "question", "last", "decode", (0, 1)], ids=str)
def test_frequency_statistics_of_a_trace_equal_those_of_the_run(positions, lens, model, requests):
    """Of the run over the same tokens, the generated ones appended; the unrun last one is no position of either."""
    traced, run = ([make(positions) for make in COUNTED] for _ in range(2))
    model.measure(requests, *traced, batch_size=4)
    with_generated(lens, requests, run)
    for one, other in zip(traced, run, strict=True):
        pd.testing.assert_frame_equal(one.table(), other.table(), rtol=1e-12)


def with_generated(lens, requests, statistics):
    """Updates statistics by the model's own run over all tokens of the requests."""
    for request in requests:
        prompt = Encoded(
            request.id, "", request.tokens, request.context, request.question, request.answer_spans,
            request.prompt_length,
        )  # fmt: skip
        record = lens._runner.record([prompt], {"routing"}, {"last"}, to_cpu=True)
        mask = record.attention_mask.clone()
        mask[:, -1] = 0
        for statistic in statistics:
            statistic.update(replace(record, attention_mask=mask))


def test_what_needs_more_than_selections_says_so(model, requests):
    for make, missing in (
        (LogitSpread, "router logits"),
        (lambda: ExpertUsage(value="gate"), "router logits"),
        (lambda: ExpertUsage(value="gating_weight"), "gating weights"),
        (lambda: RoutingVectors(k=2), "gating weights"),
        (lambda: VocabularySpecialisation("predicted"), "no logits"),
    ):
        with pytest.raises(MoELensError, match=missing):
            model.measure(requests, make())
    load, rates, contexts, selected = model.measure(
        requests, RouterLoad(), ActivationRates(), TopContexts(2), SelectedExperts()
    )
    assert load.table()[["entropy", "entropy_sd", "balance_loss"]].isna().all(axis=None)
    assert load.table()[["load_entropy", "max_load", "max_load_low"]].notna().all(axis=None)
    assert rates.table()[["weight", "first"]].isna().all(axis=None)
    assert rates.table()["rate"].notna().all()
    assert contexts.table()["weight"].eq(1).all()
    assert selected.table()["weight"].isna().all()


def test_scores_are_ranked_by_a_trace(model, lens, requests):
    found = score_tables([SCORES["ce"], SCORES["ce-last"]], Models.opened(model, model), requests)
    prompts = [one.prompt_alone() for one in requests]
    of_prompts = score_tables([SCORES["ce"]], Models.opened(model, model), prompts)
    wanted = score_tables([SCORES["ce"], SCORES["ce-last"]], Models.opened(lens, lens), EXAMPLES)
    pd.testing.assert_frame_equal(of_prompts["ce"], wanted["ce"], rtol=1e-12)
    pd.testing.assert_frame_equal(found["ce-last"], wanted["ce-last"], rtol=1e-12)
    assert not np.allclose(found["ce"]["score"], wanted["ce"]["score"]), "generated tokens count in a trace"


def spoilt(served, change):
    """The responses with the first one's experts changed."""
    found = responses(served, "offline")
    experts = np.array(found[0]["routed_experts"])
    found[0]["routed_experts"] = change(experts).tolist()
    return found


def zeros_at(experts, tokens):
    experts[tokens] = 0
    return experts


def put(experts, expert):
    experts[2, 1, 0] = expert
    return experts


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda e: e * 0, "expert 0 alone everywhere"),
        (lambda e: zeros_at(e, slice(0, 4)), "cached prefix.*4 of"),
        (lambda e: put(e, e[2, 1, 1]), "token 2, layer 1: an expert comes twice"),
        (lambda e: put(e, 16), r"names experts \[16\], and the model has 0 to 15"),
        (lambda e: put(e, -1), r"names experts \[-1\]"),
        (lambda e: e[:-1], "truncated, or of other tokens"),
        (lambda e: np.concatenate([e, e[:2]]), "truncated, or of other tokens"),
        (lambda e: e[:, :3], "another model"),
        (lambda e: e[..., :3], "another model"),
        (lambda e: e.astype(float), "whole numbers"),
    ],
)
def test_traces_that_no_router_gave_are_refused(change, says, model, served, tmp_path):
    with pytest.raises(MoELensError, match=says):
        model.read(write_lines(tmp_path / "a.jsonl", spoilt(served, change)))


def test_experts_of_the_last_generated_token_are_taken_where_they_are_told(model, served, tmp_path):
    found = model.read(write_lines(tmp_path / "a.jsonl", spoilt(served, lambda e: np.concatenate([e, e[:1]]))))
    assert found[0].told == len(found[0].tokens)
    assert int(next(model.records(found)).attention_mask[0].sum()) == found[0].told


def test_traces_of_other_prompts_and_too_few_of_them_are_refused(model, trace, served, tmp_path):
    others = load_examples("novel", limit=6)
    with pytest.raises(MoELensError, match="is of none of these prompts: the most similar one is the same for"):
        model.read(trace, others)
    with pytest.raises(MoELensError, match="no request of 1 of 6 examples"):
        model.read(write_lines(tmp_path / "few.jsonl", responses(served)[:-1]), EXAMPLES)
    twice = responses(served) + responses(served, request_id="again")[:1]
    found = model.read(write_lines(tmp_path / "twice.jsonl", twice), EXAMPLES)
    assert [one.id for one in found[1:]] == [*list(served)[1:], f"{next(iter(served))}#1"]


def test_files_that_are_cut_short_or_hold_something_else_are_refused(model, trace, served, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(trace.read_text()[:-20])
    with pytest.raises(MoELensError, match="line 6 is cut short"):
        model.read(path)
    for objects, says in (
        (responses(served, routed_experts_start=1, meta_info={"routed_experts_start_len": 3}), "from token 3 on only"),
        ([{"request_id": "a", "prompt_token_ids": [1]}], "has no routed_experts"),
        ([{"request_id": "a", "routed_experts": [[[1, 2]]]}], "has no prompt_token_ids"),
        (responses(served)[:1] * 2, "comes twice"),
        ([one | {"choices": one["choices"] * 2} for one in responses(served)], "several answers"),
        ([{"id": "a", "input_ids": [1, 2], "routed_experts": bare(np.arange(15))}], "no \\[token, 4 layers, 4\\]"),
        ([], "holds no request"),
        ([{"id": "a", "input_ids": 3, "routed_experts": [[[1, 2]]]}], "no trace as docs/traces.md has them"),
        ([{"id": "a", "input_ids": [1, 2], "routed_experts": [[[1, 2]], [[1]]]}], "truncated, or of another model"),
        ([{"top_indices": [[1, 2], [3]]}], "no trace as docs/traces.md has them"),
    ):
        with pytest.raises(MoELensError, match=says):
            model.read(write_lines(path, objects))
    with pytest.raises(MoELensError, match="there is no trace"):
        model.read(tmp_path / "none.jsonl")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(MoELensError, match="ends in one of"):
        model.read(tmp_path / "a.txt")


def test_dense_layers_that_an_engine_fills_with_zeros_are_left_out(tmp_path):
    module = tiny_model("deepseek_v3", changes={"num_hidden_layers": 3, "first_k_dense_replace": 1})
    model = TracedModel(module, tiny_tokenizer())
    assert model.architecture.moe_layers == (1, 2)
    rng, k, count = np.random.default_rng(0), model.architecture.top_k, model.architecture.n_experts
    chosen = np.stack([[rng.permutation(count)[:k] for _ in range(2)] for _ in range(5)])
    whole = np.concatenate([np.zeros((5, 1, k), chosen.dtype), chosen], 1)
    for experts in (whole, chosen):
        told = {"id": "a", "prompt_token_ids": [1, 2, 3, 4, 5], "routed_experts": experts.tolist()}
        [found] = read_requests(write_lines(tmp_path / "a.jsonl", [told]), model.architecture)
        assert found.layers == (1, 2)
        assert (found.experts == chosen).all()


def test_a_replayed_trace_goes_where_the_engine_sent_it(lens, model, requests, served):
    """Replaying the model's own trace changes no bit; another one's is followed at every token of the prompts."""
    [before] = lens.records(EXAMPLES, capture=("routing", "logits"), positions="last", progress=False)
    with lens.intervene(Replay(TraceRun(requests))):
        [after] = lens.records(EXAMPLES, capture=("routing", "logits"), positions="last", progress=False)
    assert torch.equal(before.logits, after.logits)
    moved = [
        Request(one.id, one.tokens, one.prompt_length, one.layers, (one.experts.astype(int) + 1) % 16, 16)
        for one in requests
    ]
    with lens.intervene(Replay(TraceRun(moved))):
        [record] = lens.records(EXAMPLES, progress=False)
        answers = lens.generate(EXAMPLES, max_new_tokens=2, progress=False)
    assert len(answers) == len(EXAMPLES)
    by_id = {one.id: one for one in moved}
    for row, name in enumerate(record.ids):
        own = by_id[name]
        for place, routing in enumerate(record.routing.values()):
            found = routing.indices[row, record.attention_mask[row].bool()].sort(-1).values
            wanted = np.sort(own.experts[: own.prompt_length, place].astype(int), -1)
            assert found.tolist() == wanted.tolist()
    with lens.intervene(Replay(TraceRun(moved[1:]))), pytest.raises(MoELensError, match="no request with the"):
        list(lens.records(EXAMPLES, progress=False))
    with pytest.raises(MoELensError, match="gating weights"), lens.intervene(Replay(TraceRun(moved), weights="source")):
        list(lens.records(EXAMPLES, progress=False))
    assert TraceRun(moved).digest != TraceRun(requests).digest


def random_request(name, tokens, prompt, rng, margins=None):
    experts = np.stack([[rng.permutation(8)[:2] for _ in range(3)] for _ in range(len(tokens) - 1)])
    return Request(name, tuple(tokens), prompt, (1, 2, 5), experts, 8, margins=margins)


def test_agreement_is_counted_by_layer_by_margin_and_from_the_first_token_on():
    """By hand: two requests of 5 run tokens; one expert of one token differs, and all of one token of another layer."""
    rng = np.random.default_rng(0)
    margins = np.arange(15.0).reshape(5, 3)
    first = [random_request("a", [3, 4, 5, 6, 7, 8], 4, rng, margins), random_request("b", [4, 4, 5, 6, 7, 8], 4, rng)]
    experts = first[0].experts.astype(int)
    other = experts.copy()
    other[3, 1, 0] = next(one for one in range(8) if one not in experts[3, 1])  # one of two, layer 2
    other[4, 2] = [one for one in range(8) if one not in experts[4, 2]][:2]  # both, layer 5
    second = [replace(first[1], id="y"), replace(first[0], id="x", experts=other[..., ::-1], margins=None)]
    tables = trace_agreement(first, second)
    table = tables["agreement"].set_index("layer")
    assert table["tokens"].tolist() == [10, 10, 10]
    assert table["agreement"].tolist() == [1, 1 - 0.5 / 10, 1 - 1 / 10]
    assert table["exact"].tolist() == [1, 0.9, 0.9]
    assert table["expected"].tolist() == [0.25] * 3
    assert (table["exact_low"] <= table["exact"]).all()
    divergence = tables["divergence"].set_index("id")
    assert divergence.loc["a"].tolist() == [5, 2, 3, 2]
    assert divergence.loc["b"].tolist() == [5, 2, -1, -1]
    ties = tables["near_ties"]
    assert ties.groupby("layer")["tokens"].sum().tolist() == [5, 5, 5]
    assert ties.query("layer == 2 and unlike == 1")["margin_low"].tolist() == [margins[3, 1]]
    said = replace(first[0], tokens=(3, 4, 5, 6, 1, 8))
    cut = trace_agreement(first, [said, first[1]])["divergence"].set_index("id").loc["a"]
    assert cut.tolist() == [4, 0, -1, -1], "after the first unlike generated token nothing is comparable"


def test_agreement_with_oneself_is_whole_and_other_prompts_are_refused(requests):
    tables = trace_agreement(requests, requests)
    assert (tables["agreement"][["agreement", "exact"]] == 1).all(axis=None)
    assert (tables["divergence"]["first"] == -1).all()
    assert not len(tables["near_ties"])
    with pytest.raises(MoELensError, match="expected two traces of the same prompts; 1 requests are in one only"):
        trace_agreement(requests, requests[1:])
