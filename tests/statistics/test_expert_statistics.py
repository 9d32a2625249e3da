"""Statistics of single experts and pairs: co-activation, vocabulary, selections, specialisation, risk, weights."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from test_routing_statistics import RECORDS, every_token
from test_usage import record

from moe_lens.errors import MoELensError
from moe_lens.metrics import domain_specialisation, risk_difference, router_saturation
from moe_lens.routing import Routing
from moe_lens.statistics import (
    CoActivation,
    RoutingVectors,
    SelectedExperts,
    VocabularySpecialisation,
    weight_similarity,
)


def routed(experts: list[list[list[int]]], ids: str, *, n_experts: int = 4, words=None):
    """One layer whose tokens select these experts, [batch, pos, k], the first with the highest weight."""
    indices = torch.tensor(experts)
    weights = torch.linspace(0.9, 0.1, indices.shape[-1]).expand(indices.shape)
    routing = {3: Routing(torch.zeros(*indices.shape[:2], n_experts), indices, weights)}
    base = record([indices.shape[1]] * len(indices), layers=())
    words = torch.zeros(indices.shape[:2], dtype=torch.int64) if words is None else torch.tensor(words)
    return replace(base, ids=tuple(ids), input_ids=words, captured={"routing": routing})


def test_coactivation_by_hand_and_rows_sum_to_k_minus_one():
    table = CoActivation().update(routed([[[0, 1], [1, 2], [0, 1]]], "a")).table().set_index(["expert", "other"])
    assert table.loc[(0, 1), ["together", "probability"]].tolist() == [2, 1]
    assert table.loc[(1, 0), "probability"] == pytest.approx(2 / 3)
    assert table.loc[(1, 2), "probability"] == pytest.approx(1 / 3)
    assert table.loc[(2, 1), "probability"] == 1
    assert table.loc[3, "probability"].isna().all()
    many = CoActivation().update(RECORDS[0]).update(RECORDS[1]).table()
    sums = many.groupby(["layer", "expert"])["probability"].sum()
    assert sums.to_numpy() == pytest.approx(3 - 1)
    assert len(sums) == 14


def test_vocabulary_specialisation_by_counting():
    words = [torch.randint(0, 5, part.input_ids.shape, generator=torch.Generator().manual_seed(1)) for part in RECORDS]
    parts = [replace(part, input_ids=own) for part, own in zip(RECORDS, words, strict=True)]
    counts, pairs = Counter(), Counter()
    for part in parts:
        real = part.input_ids[part.attention_mask.bool()].tolist()
        counts.update(real)
        pairs.update((w, e) for w, (chosen, _) in zip(real, every_token(part, 2), strict=True) for e in chosen)
    whole = VocabularySpecialisation().update(parts[0]).update(parts[1])
    merged = VocabularySpecialisation().merge(VocabularySpecialisation().update(parts[1])).update(parts[0])
    pd.testing.assert_frame_equal(merged.table(), whole.table())
    table = whole.table().query("layer == 2")
    assert {(row.token_id, row.expert): row.selected for row in table.itertuples()} == pairs
    assert {row.token_id: row.tokens for row in table.itertuples()} == counts
    assert table.groupby("token_id")["specialisation"].sum().to_numpy() == pytest.approx(3)


def test_vocabulary_of_predicted_tokens_reads_the_logits():
    given = routed([[[0, 1], [2, 3]]], "a")
    logits = torch.zeros(1, 2, 6)
    logits[0, 0, 5], logits[0, 1, 4] = 1, 1
    given = replace(given, logits=logits, kept=torch.arange(2))
    table = VocabularySpecialisation("predicted").update(given).table()
    assert list(zip(table["expert"], table["token_id"], strict=True)) == [(0, 5), (1, 5), (2, 4), (3, 4)]
    with pytest.raises(MoELensError, match="did not keep all positions 'all'"):
        VocabularySpecialisation("predicted").update(replace(given, logits=logits[:, 1:], kept=torch.tensor([1])))
    with pytest.raises(MoELensError, match="holds no logits"):
        VocabularySpecialisation("predicted").update(replace(given, logits=None))
    with pytest.raises(MoELensError, match="equal settings"):
        VocabularySpecialisation().merge(VocabularySpecialisation("predicted"))


def test_selected_experts_come_in_order_of_weight():
    given = RECORDS[0]
    table = SelectedExperts().update(given).table()
    assert len(table) == (11 + 3 + 8) * 3 * 2
    routing = given.routing[1]
    for row, start in enumerate((given.attention_mask == 0).sum(1).tolist()):
        part = table[(table["id"] == given.ids[row]) & (table["layer"] == 1)]
        for position, token in part.groupby("position"):
            experts, weights = (part[row, start + position].tolist() for part in (routing.indices, routing.weights))
            chosen = dict(zip(experts, weights, strict=True))
            assert dict(zip(token["expert"], token["weight"], strict=True)) == pytest.approx(chosen)
            assert token["weight"].is_monotonic_decreasing


def test_saturation_by_hand():
    first = SelectedExperts().update(routed([[[0, 1], [1, 2]], [[0, 3], [3, 0]]], "ab")).table()
    second = SelectedExperts().update(routed([[[1, 0], [1, 3]], [[0, 1], [1, 2]]], "ab")).table()
    both = router_saturation(first, second, n_experts=4).iloc[0]
    assert both["saturation"] == pytest.approx((1 + 1 / 2 + 1 / 2 + 0) / 4)
    assert (both["tokens"], both["examples"], both["expected"]) == (4, 2, 0.5)
    assert both["saturation_low"] <= both["saturation"] <= both["saturation_high"]
    top = router_saturation(first, second, n_experts=4, k=1).iloc[0]
    assert top["saturation"] == pytest.approx((0 + 1 + 1 + 0) / 4)
    itself = router_saturation(first, first, n_experts=4).iloc[0]
    assert itself["saturation_low"] < itself["saturation"] == itself["saturation_high"] == 1, "never of no width"
    with pytest.raises(MoELensError, match="same tokens"):
        router_saturation(first, second.query("position == 0"), n_experts=4)
    with pytest.raises(MoELensError, match="between 1 and 2"):
        router_saturation(first, second, n_experts=4, k=3)


def test_routing_vectors_of_the_first_choice_only():
    table = RoutingVectors(k=1).update(routed([[[0, 1], [2, 0]]], "a")).table()
    assert table["rate"].tolist() == [0.5, 0, 0.5, 0]
    with pytest.raises(MoELensError, match="selects 2 experts; got k=3"):
        RoutingVectors(k=3).update(routed([[[0, 1]]], "a"))


def vectors(experts, ids):
    return RoutingVectors().update(routed(experts, ids)).table()


def test_domain_specialisation_counts_tokens_of_a_domain():
    code = vectors([[[0, 1], [0, 2]]], "a")
    prose = pd.concat([vectors([[[1, 2], [1, 3], [1, 2]]], "b"), vectors([[[0, 3]]], "c")])
    table = domain_specialisation(pd.concat([code.assign(domain="code"), prose.assign(domain="prose")]))
    assert table.query("domain == 'code'")["specialisation"].tolist() == [1, 0.5, 0.5, 0]
    assert table.query("domain == 'prose'")["specialisation"].tolist() == [1 / 4, 3 / 4, 2 / 4, 2 / 4]
    assert table["uniform"].tolist() == [0.5] * 8
    row = table.query("domain == 'prose' and expert == 0").iloc[0]
    assert (row["examples"], row["tokens"]) == (2, 4)
    assert 0 < row["specialisation_low"] < 0.05, "of two examples, one of which has no such token"
    assert 0.95 < row["specialisation_high"] < 1
    with pytest.raises(MoELensError, match="column 'domain'"):
        domain_specialisation(code)


def test_risk_difference_of_two_sides():
    first = pd.concat([vectors([[[0, 1], [0, 2]]], "a"), vectors([[[0, 1]]], "b")])
    second = pd.concat([vectors([[[1, 2]]], "a"), vectors([[[2, 3], [0, 3], [1, 0]]], "b")])
    table = risk_difference(first, second)
    assert table["first"].tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert table["second"].tolist() == pytest.approx([2 / 4, 2 / 4, 2 / 4, 2 / 4])
    assert table["risk_difference"].tolist() == pytest.approx([1 / 2, 1 / 6, -1 / 6, -1 / 2])
    assert (table["risk_difference_low"] <= table["risk_difference"]).all()
    assert (table["risk_difference_high"] >= table["risk_difference"]).all()
    itself = risk_difference(first, first)
    assert (itself["risk_difference"] == 0).all()
    assert np.allclose(itself["risk_difference_low"], -itself["risk_difference_high"]), "both are resampled in pairs"
    assert (itself["risk_difference_high"] > 0).all(), "never of no width"
    others = risk_difference(first, first.assign(id=first["id"] + "'"))
    assert not np.allclose(others["risk_difference_low"], itself["risk_difference_low"]), "others vary apart"
    with pytest.raises(MoELensError, match="same layers and experts"):
        risk_difference(first, second.query("expert > 0"))
    with pytest.raises(MoELensError, match="id repeats"):
        risk_difference(first, pd.concat([second, second]))


def test_weight_similarity_is_the_cosine_of_all_weights(lens):
    table = weight_similarity(lens).set_index(["layer", "expert", "other"])["similarity"]
    layer = lens.architecture.moe_layers[-1]
    experts = lens.module.get_submodule(lens.architecture.at(layer).experts)
    flat = [
        np.concatenate([weight[e].detach().flatten().double().numpy() for weight in experts.parameters()])
        for e in (1, 4)
    ]
    cosine = flat[0] @ flat[1] / np.sqrt((flat[0] @ flat[0]) * (flat[1] @ flat[1]))
    assert table[layer, 1, 4] == pytest.approx(cosine, abs=1e-5)
    assert table[layer, 4, 1] == pytest.approx(table[layer, 1, 4])
    with torch.no_grad():
        kept = [weight[2].clone() for weight in experts.parameters()]
        for weight in experts.parameters():
            weight[2] = 3 * weight[5]
        copies = weight_similarity(lens).set_index(["layer", "expert", "other"])["similarity"]
        for weight, own in zip(experts.parameters(), kept, strict=True):
            weight[2] = own
    assert copies[layer, 2, 5] == pytest.approx(1, abs=1e-5)
