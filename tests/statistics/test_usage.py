"""ExpertUsage: Eq. 8 by hand, streaming against whole batches, and ESFT's published scores and selections."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from moe_lens.choosing import SCORES, Ground, Share
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet, cumulative_order
from moe_lens.lens import Needs, Record, Statistic
from moe_lens.routing import Routing
from moe_lens.statistics import ExpertUsage

ALL_SETTINGS = pytest.mark.parametrize(
    ("reduce", "positions", "value"),
    [
        (reduce, positions, value)
        for reduce in ("sample", "token")
        for positions in ("all", "context", "question", "last")
        for value in ("frequency", "gating_weight", "gate")
    ],
)


def record(lengths, *, layers=(1, 2), n_experts=6, k=2, seed=0, pads=0) -> Record:
    """Random routing of prompts of these lengths; pads hold NaN and point to expert 0."""
    rng = torch.Generator().manual_seed(seed)
    width = max(lengths) + pads
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])
    routing = {}
    for layer in layers:
        logits = torch.randn(len(lengths), width, n_experts, generator=rng)
        weights, indices = logits.softmax(-1).topk(k)
        pad = mask[..., None] == 0
        logits, weights = (part.masked_fill(pad, torch.nan) for part in (logits, weights))
        routing[layer] = Routing(logits, indices.masked_fill(pad, 0), weights)
    starts = [width - length for length in lengths]
    return Record(
        ids=tuple(map(str, range(len(lengths)))),
        input_ids=torch.zeros_like(mask),
        attention_mask=mask,
        context_spans=tuple(slice(s + 1, s + 3) if i % 3 else None for i, s in enumerate(starts)),
        question_spans=tuple(slice(s + 2, width - 1) for s in starts),
        answer_spans=((),) * len(lengths),
        kept=torch.arange(width),
        captured={"routing": routing},
        routing_before=routing,
    )


def row_of(whole: Record, row: int) -> Record:
    """One sample of a record, without its pads."""
    start = int((whole.attention_mask[row] == 0).sum())

    def cut(span):
        return None if span is None else slice(span.start - start, span.stop - start)

    routing = {
        layer: Routing(*(part[row : row + 1, start:] for part in (r.logits, r.indices, r.weights)))
        for layer, r in whole.routing.items()
    }
    return replace(
        whole,
        ids=whole.ids[row : row + 1],
        input_ids=whole.input_ids[row : row + 1, start:],
        attention_mask=whole.attention_mask[row : row + 1, start:],
        context_spans=(cut(whole.context_spans[row]),),
        question_spans=(cut(whole.question_spans[row]),),
        answer_spans=((),),
        captured={"routing": routing},
        routing_before=routing,
    )


def by_hand(whole: Record, reduce: str, positions: str, value: str) -> dict[tuple[int, int], float]:
    """The definition with plain loops: r_i as a mean of means, or as one mean."""
    scores = {}
    for layer, routing in whole.routing.items():
        gates = routing.logits.double().softmax(-1)
        for expert in range(routing.n_experts):
            samples = []
            for row in range(len(whole.ids)):
                end = whole.attention_mask.shape[1]
                start = end - int(whole.attention_mask[row].sum())
                spans = {
                    "all": slice(start, end),
                    "last": slice(end - 1, end),
                    "context": whole.context_spans[row],
                    "question": whole.question_spans[row],
                }
                tokens = []
                for t in range(end)[spans[positions]] if spans[positions] else []:
                    chosen = routing.indices[row, t].tolist()
                    use = {"frequency": 0.0, "gating_weight": 0.0, "gate": 0.0}
                    if expert in chosen:
                        use["frequency"] = 1 / len(chosen)
                        use["gating_weight"] = float(routing.weights[row, t, chosen.index(expert)])
                        use["gate"] = float(gates[row, t, expert])
                    tokens.append(use[value])
                samples += [tokens] if tokens else []
            means = [np.mean(tokens) for tokens in samples]
            scores[layer, expert] = np.mean(means) if reduce == "sample" else np.mean(np.concatenate(samples))
    return scores


@ALL_SETTINGS
def test_agrees_with_the_definition_written_out_and_counts_no_pad(reduce, positions, value):
    whole = record([5, 9, 4, 7], pads=2)
    table = ExpertUsage(reduce, positions, value=value).update(whole).table()
    expected = by_hand(whole, reduce, positions, value)
    assert list(table.columns) == ["layer", "expert", "score"]
    assert [*zip(table.layer, table.expert, strict=True)] == list(expected)
    np.testing.assert_allclose(table.score, list(expected.values()), rtol=0, atol=1e-7)


@ALL_SETTINGS
def test_streaming_and_merging_equal_one_pass(reduce, positions, value):
    whole = record([5, 9, 4, 7, 6])
    parts = [row_of(whole, row) for row in range(5)]
    settings = {"reduce": reduce, "positions": positions, "value": value}
    one_pass = ExpertUsage(**settings).update(whole)
    streamed, left, right = (ExpertUsage(**settings) for _ in range(3))
    for number, part in enumerate(parts):
        streamed.update(part)
        (left if number < 2 else right).update(part)
    merged = ExpertUsage(**settings).merge(left).merge(right)
    for other in (streamed, merged):
        assert (other.counted, other.skipped) == (one_pass.counted, one_pass.skipped)
        np.testing.assert_allclose(other.table().score, one_pass.table().score, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reduce", ["sample", "token"])
@pytest.mark.parametrize("positions", ["all", "context", "question", "last"])
def test_frequencies_of_a_layer_sum_to_one(reduce, positions):
    usage = ExpertUsage(reduce, positions)
    for seed in range(20):
        usage.update(record([11, 3, 8], k=3, n_experts=7, seed=seed))
    sums = usage.table().groupby("layer").score.sum()
    assert list(sums.index) == [1, 2]
    np.testing.assert_allclose(sums, 1, rtol=0, atol=1e-12)


def test_a_hand_case_tells_samples_from_tokens():
    logits = torch.zeros(2, 4, 3)
    indices = torch.tensor([[[0], [0], [0], [0]], [[1], [1], [1], [2]]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]])
    base = record([4, 1])
    routing = {0: Routing(logits, indices, torch.full((2, 4, 1), 0.25))}
    hand = replace(base, attention_mask=mask, captured={"routing": routing})
    assert ExpertUsage("sample").update(hand).table().score.tolist() == [0.5, 0, 0.5]
    assert ExpertUsage("token").update(hand).table().score.tolist() == [0.8, 0, 0.2]
    assert ExpertUsage(value="gating_weight").update(hand).table().score.tolist() == [0.125, 0, 0.125]
    assert ExpertUsage(value="gate").update(hand).table().score.tolist() == pytest.approx([1 / 6, 0, 1 / 6])


def test_use_is_read_from_the_routing_that_the_experts_got():
    whole = record([5, 6])
    silenced = {layer: replace(r, weights=torch.zeros_like(r.weights)) for layer, r in whole.routing.items()}
    whole = replace(whole, captured={"routing": silenced})
    assert ExpertUsage(value="gating_weight").update(whole).table().score.eq(0).all()


def test_samples_without_such_positions_are_left_out_and_counted():
    whole = record([5, 9, 4, 7])  # samples 0 and 3 have no context
    usage = ExpertUsage(positions="context").update(whole)
    assert (usage.counted, usage.skipped) == (2, 2)
    assert usage.table().attrs == {
        "reduce": "sample",
        "positions": "context",
        "value": "frequency",
        "counted": 2,
        "skipped": 2,
    }
    only_with_context = ExpertUsage(positions="context").update(row_of(whole, 1)).update(row_of(whole, 2))
    np.testing.assert_allclose(usage.table().score, only_with_context.table().score, atol=1e-12)
    with pytest.raises(MoELensError, match="none of 1 samples has any position 'context'"):
        ExpertUsage(positions="context").update(row_of(whole, 0)).table()


def test_the_table_is_a_snapshot_and_records_are_left_alone():
    whole = record([5, 9])
    before = whole.routing[1].weights.clone()
    usage = ExpertUsage(value="gating_weight").update(whole)
    first = usage.table()
    kept = first.copy()
    usage.update(record([3, 4], seed=9))
    pd.testing.assert_frame_equal(first, kept)
    assert torch.equal(whole.routing[1].weights.nan_to_num(), before.nan_to_num())
    assert isinstance(usage, Statistic)
    assert usage.needs == Needs(frozenset({"routing"}))


def test_misuse_is_refused():
    for settings in ({"reduce": "mean"}, {"positions": "everywhere"}, {"value": "count"}):
        with pytest.raises(MoELensError, match=f"{next(iter(settings))} must be one of"):
            ExpertUsage(**settings)
    with pytest.raises(MoELensError, match="equal settings"):
        ExpertUsage("sample").merge(ExpertUsage("token"))
    with pytest.raises(MoELensError, match="none of 0 samples"):
        ExpertUsage().table()
    with pytest.raises(MoELensError, match="holds no routing"):
        ExpertUsage().update(replace(record([3]), captured={}))
    usage = ExpertUsage().update(record([3]))
    for other in (record([3], layers=(1,)), record([3], n_experts=5)):
        with pytest.raises(MoELensError, match="a record of the same model"):
            usage.update(other)


# ESFT's published routing of DeepSeek-V2-Lite on its law data


@pytest.fixture(scope="module")
def esft() -> tuple[dict, list[Record]]:
    """The published scores and selections, and the published routing as one record per sample."""
    if "MOE_LENS_SHARED" not in os.environ:
        pytest.skip("MOE_LENS_SHARED is not set")
    folder = Path(os.environ["MOE_LENS_SHARED"]) / "goldens"
    published = json.loads((folder / "esft_law.json").read_text())
    arrays = np.load(folder / "esft_law.npz")
    indices = torch.tensor(arrays["top_k_index"].astype(np.int64))  # [layer, token, k]
    gates = torch.tensor(arrays["top_k_weight_e4"].astype(np.float32)) / 1e4
    logits = logits_with_these_gates(indices, gates, published["n_experts"])
    ends = np.cumsum(arrays["sample_lengths"])
    samples = [
        {
            layer: Routing(logits[row, None, a:b], indices[row, None, a:b], gates[row, None, a:b])
            for row, layer in enumerate(published["layers"])
        }
        for a, b in zip([0, *ends[:-1]], ends, strict=True)
    ]
    return published, [sample_record(routing) for routing in samples]


def logits_with_these_gates(indices, gates, n_experts):
    """Logits [layer, token, expert] whose softmax is `gates` [layer, token, k] at the experts `indices`.

    What is missing to a sum of 1 goes to one expert that was not selected.
    """
    probabilities = torch.zeros(*indices.shape[:2], n_experts).scatter(-1, indices, gates)
    selected = torch.zeros(*indices.shape[:2], n_experts, dtype=torch.bool).scatter(-1, indices, True)
    rest = (1 - gates.sum(-1, keepdim=True)).clamp(min=0)
    return probabilities.scatter(-1, selected.int().argmin(-1, keepdim=True), rest).log()


def sample_record(routing: dict[int, Routing]) -> Record:
    tokens = next(iter(routing.values())).indices.shape[1]
    one = record([tokens], layers=())
    return replace(one, captured={"routing": routing}, routing_before=routing)


def usage_of(records, reduce, value) -> pd.DataFrame:
    usage = ExpertUsage(reduce, value=value)
    for sample in records:
        usage.update(sample)
    return usage.table()


def published_table(scores: dict[str, dict[str, float]]) -> pd.DataFrame:
    cells = [(int(layer), int(e), s) for layer, row in scores.items() for e, s in row.items()]
    return pd.DataFrame(cells, columns=["layer", "expert", "score"]).sort_values(["layer", "expert"])


@pytest.mark.parametrize(("value", "name"), [("frequency", "token_scores"), ("gate", "gate_scores")])
def test_esft_scores_are_reproduced_by_the_token_reduction_only(esft, value, name):
    published, records = esft
    expected = published_table(published[name]).score.to_numpy()
    assert expected.shape == (26 * 64,)
    ours = usage_of(records, "token", value).score.round(4).to_numpy()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-9)
    by_sample = usage_of(records, "sample", value).score.round(4).to_numpy()
    assert np.mean(np.abs(by_sample - expected) > 1e-9) > 0.5


def test_esft_selections_are_reproduced_by_the_token_reduction_only(esft):
    published, records = esft
    expected = ExpertSet.of({int(layer): ids for layer, ids in published["selected_token_p0.2"].items()})
    assert len(expected.layers) == 26
    assert ExpertSet.cumulative(usage_of(records, "token", "frequency"), 0.2) == expected
    assert ExpertSet.cumulative(usage_of(records, "sample", "frequency"), 0.2) != expected


def test_esft_selections_come_in_the_published_order_ties_at_four_decimals_included(esft):
    published, records = esft
    expected = {int(layer): tuple(ids) for layer, ids in published["selected_token_p0.2"].items()}
    table = usage_of(records, "token", "frequency")
    assert len(expected) == 26
    assert cumulative_order(table, 0.2) == expected
    tied = table[(table.layer == 21) & table.expert.isin([11, 30])].set_index("expert").score
    assert tied.nunique() == 2, "no tie of unlike scores"
    assert tied.round(4).nunique() == 1
    ground = Ground(architecture=None, model="esft", tables={"esft-token": table})
    assert Share(SCORES["esft-token"], 0.2).experts(ground) == ExpertSet.of(expected)
