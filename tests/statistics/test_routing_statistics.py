"""Statistics of routing: routing vectors, router load and the others, by hand and against a second way."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from test_usage import record

from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens import Needs
from moe_lens.routing import Routing
from moe_lens.statistics import (
    CoActivation,
    ExpertUsage,
    RouterLoad,
    RoutingVectors,
    SelectedExperts,
    VocabularySpecialisation,
)
from moe_lens.statistics.accumulators import LayerSums

RECORDS = [record([11, 3, 8], k=3, n_experts=7), record([5, 9], k=3, n_experts=7, seed=4, pads=2)]


def renamed(parts):
    """The records with ids of their own, as a data set's are."""
    return [replace(part, ids=tuple(f"{n}-{i}" for i in part.ids)) for n, part in enumerate(parts)]


def every_token(part, layer):
    """Indices, logits of the real tokens only: a second way, without masks or sums."""
    routing = part.routing[layer]
    return [
        (sorted(routing.indices[row, pos].tolist()), routing.logits[row, pos].double().numpy())
        for row in range(len(part.ids))
        for pos in range(routing.indices.shape[1])
        if part.attention_mask[row, pos]
    ]


@pytest.mark.parametrize("positions", ["all", "context", "question", "last"])
def test_mean_routing_vectors_are_equation_8(positions):
    vectors, usage = RoutingVectors(positions=positions), ExpertUsage("sample", positions)
    by_token = ExpertUsage("token", positions)
    for part in renamed(RECORDS):
        vectors.update(part), usage.update(part), by_token.update(part)
    table = vectors.table()
    mean = table.groupby(["layer", "expert"])["rate"].mean() / 3
    assert mean.to_numpy() == pytest.approx(usage.table()["score"].to_numpy())
    weighted = table.assign(sum=table["rate"] * table["tokens"]).groupby(["layer", "expert"])[["sum", "tokens"]].sum()
    assert (weighted["sum"] / weighted["tokens"] / 3).to_numpy() == pytest.approx(by_token.table()["score"].to_numpy())
    assert table.groupby(["id", "layer"])["rate"].sum().to_numpy() == pytest.approx(3)


def test_vectors_of_chosen_experts_are_a_part_of_all():
    chosen = ExpertSet.of({1: [0, 4], 2: [6]})
    some, every = (RoutingVectors(experts).update(RECORDS[0]).table() for experts in (chosen, None))
    wanted = [(row.layer, row.expert) in chosen for row in every.itertuples()]
    pd.testing.assert_frame_equal(some, every[wanted].reset_index(drop=True))
    assert len(some) == 9


def test_load_and_entropy_by_a_second_way():
    load = RouterLoad().update(RECORDS[0]).update(RECORDS[1])
    for layer, row in load.table().set_index("layer").iterrows():
        tokens = [token for part in RECORDS for token in every_token(part, layer)]
        probabilities = np.array([np.exp(logits) / np.exp(logits).sum() for _, logits in tokens])
        entropies = -(probabilities * np.log2(probabilities)).sum(1)
        counts = np.bincount([expert for chosen, _ in tokens for expert in chosen], minlength=7)
        shares = counts / counts.sum()
        assert row["tokens"] == len(tokens) == 36
        assert row["entropy"] == pytest.approx(entropies.mean(), rel=1e-5)
        assert row["entropy_sd"] == pytest.approx(entropies.std(), rel=1e-4)
        assert row["load_entropy"] == pytest.approx(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum())
        assert row["max_load"] == pytest.approx(7 * shares.max())
        assert row["unused"] == (counts == 0).sum()
        balance = 7 * (counts / len(tokens) * probabilities.mean(0)).sum()
        assert row["balance_loss"] == pytest.approx(balance, rel=1e-5)


def test_an_even_load_is_known():
    indices = torch.tensor([[[0, 1], [2, 3]]])
    routing = Routing(torch.zeros(1, 2, 4), indices, torch.ones(1, 2, 2))
    even = replace(record([2], layers=()), captured={"routing": {0: routing}})
    row = RouterLoad().update(even).table().iloc[0]
    assert row[["entropy", "load_entropy", "max_load", "unused", "balance_loss"]].tolist() == [2, 2, 1, 0, 2]


SUMMED = pytest.mark.parametrize("make", [RouterLoad, CoActivation], ids=lambda make: make.__name__)
LISTED = pytest.mark.parametrize("make", [RoutingVectors, SelectedExperts], ids=lambda make: make.__name__)


@SUMMED
def test_streaming_in_any_order_and_merging_equal_one_pass(make):
    whole = make().update(RECORDS[0]).update(RECORDS[1]).table()
    other_order = make().update(RECORDS[1]).update(RECORDS[0]).table()
    merged = make().merge(make().update(RECORDS[0])).merge(make()).merge(make().update(RECORDS[1])).table()
    pd.testing.assert_frame_equal(other_order, whole)
    pd.testing.assert_frame_equal(merged, whole)


class Added(LayerSums):
    """What a record's token ids say, as float32 as a model's numbers are."""

    def __init__(self) -> None:
        super().__init__(Needs(()), {})

    def sums(self, record):
        return {0: {"sum": record.input_ids.float().sum()}}


def test_sums_do_not_lose_what_is_small_beside_them():
    large, small = (replace(record([2], layers=()), input_ids=torch.tensor([[ids, 0]])) for ids in (2**24, 1))
    added = Added().update(large)
    for _ in range(5):
        added.update(small)
    assert added.layer_sums()[0]["sum"].item() == 2**24 + 5  # float32 would stay at 2**24


@LISTED
def test_rows_of_examples_do_not_depend_on_batches(make):
    first, second = renamed(RECORDS)
    whole = make().update(first).update(second).table()
    merged = make().update(second).merge(make().update(first)).table()
    pd.testing.assert_frame_equal(merged, whole)
    assert whole.index.is_unique


@SUMMED
def test_sums_of_other_models_or_settings_are_refused(make):
    with pytest.raises(MoELensError, match="same model"):
        make().update(RECORDS[0]).update(record([3], k=3, n_experts=5))
    with pytest.raises(MoELensError, match="equal settings"):
        make().merge(make(positions="last"))
    with pytest.raises(MoELensError, match="has seen no token that counts"):
        make().table()


@pytest.mark.parametrize(
    "make", [RouterLoad, CoActivation, VocabularySpecialisation, ExpertUsage, RoutingVectors, SelectedExperts]
)
def test_where_no_token_counts_there_is_no_table(make):
    closed_book = replace(RECORDS[0], context_spans=(None,) * len(RECORDS[0].ids))
    with pytest.raises(MoELensError, match=r"has seen no|none of 3 samples has any"):
        make(positions="context").update(closed_book).table()
