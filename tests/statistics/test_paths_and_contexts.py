"""What the atlas of experts counts: rates, paths between layers, what tokens tell, and the places of most weight."""

from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from test_expert_statistics import routed
from test_routing_statistics import RECORDS
from torch.nn.functional import cosine_similarity

from moe_lens.errors import MoELensError
from moe_lens.routing import Routing
from moe_lens.statistics import ActivationRates, ExpertPaths, TokenBaseline, TopContexts, router_similarity
from moe_lens.statistics.jackknife import groups_of

ONE_OF_EACH = [name for _, name in sorted({int(groups_of([name])): name for name in map(str, range(60))}.items())]
"""Ten ids, one of each group of examples."""


def in_words(seed: int, *, batch: int = 10, words: int = 4) -> torch.Tensor:
    return torch.randint(0, words, (batch, 30), generator=torch.Generator().manual_seed(seed))


def taken(words: torch.Tensor, experts: torch.Tensor, ids=ONE_OF_EACH):
    """A record of one layer whose tokens [batch, pos] take these experts [batch, pos, k]."""
    return routed(experts.tolist(), ids, words=words.tolist())


def noise(seed: int, *, batch: int = 10) -> torch.Tensor:
    scores = torch.rand(batch, 30, 4, generator=torch.Generator().manual_seed(seed))
    return scores.topk(2, dim=-1).indices


def test_activation_rates_by_hand():
    table = ActivationRates().update(routed([[[0, 1], [1, 2], [0, 1]]], "a")).table().set_index("expert")
    assert table["selected"].tolist() == [2, 3, 1, 0]
    assert table["rate"].tolist() == pytest.approx([2 / 3, 1, 1 / 3, 0])
    assert table["weight"].tolist()[:3] == pytest.approx([0.9, (0.1 + 0.9 + 0.1) / 3, 0.1])
    assert table["first"].tolist()[:3] == pytest.approx([1, 1 / 3, 0])
    assert table.loc[3, ["weight", "first"]].isna().all()
    assert table["rate_low"].isna().all(), "one text tells nothing of others"


def test_activation_rates_of_parts_are_those_of_the_whole():
    whole = ActivationRates().update(RECORDS[0]).update(RECORDS[1])
    merged = ActivationRates().merge(ActivationRates().update(RECORDS[1])).update(RECORDS[0])
    pd.testing.assert_frame_equal(merged.table(), whole.table())
    assert whole.table().groupby("layer")["rate"].sum().to_numpy() == pytest.approx(3)
    again = ActivationRates().update(taken(in_words(0), noise(1))).table()
    assert (again["rate_low"] < again["rate"]).all()
    assert (again["rate"] < again["rate_high"]).all()


def through(first: list[list[int]], second: list[list[int]]):
    """One text, whose tokens take these experts in layer 3 and those in layer 7."""
    record = routed([first], "a")
    [other] = routed([second], "a").routing.values()
    return replace(record, captured={"routing": {**record.routing, 7: other}})


def test_paths_by_hand():
    given = through([[0, 1], [0, 2], [1, 2]], [[2, 3], [2, 0], [0, 1]])
    table = ExpertPaths().merge(ExpertPaths().update(given)).table()
    assert set(zip(table["layer"], table["next_layer"], strict=True)) == {(3, 7)}
    table = table.set_index(["expert", "other"])
    assert table.loc[(0, 2), ["together", "probability", "rate", "lift"]].tolist() == pytest.approx([2, 1, 2 / 3, 1.5])
    assert table.loc[(1, 2), ["together", "probability", "lift"]].tolist() == pytest.approx([1, 1 / 2, 3 / 4])
    assert table.loc[(2, 3), "lift"] == 0
    assert table.loc[3, ["probability", "lift"]].isna().all(axis=None), "never selected"
    assert table["probability"].groupby("expert").sum().tolist()[:3] == pytest.approx([2, 2, 2])


def test_paths_are_counted_token_by_token_and_those_of_independent_layers_are_of_no_ratio():
    first, second = noise(1), noise(2)
    records = [taken(in_words(0), part) for part in (first, second)]
    [other] = records[1].routing.values()
    given = replace(records[0], captured={"routing": {**records[0].routing, 7: other}})
    table = ExpertPaths().update(given).table().set_index(["expert", "other"])
    pairs = Counter(
        pair
        for one, two in zip(first.flatten(0, 1).tolist(), second.flatten(0, 1).tolist(), strict=True)
        for pair in product(one, two)
    )
    assert table["together"].to_dict() == {pair: pairs[pair] for pair in product(range(4), range(4))}
    surely = (table["lift_low"] > 1) | (table["lift_high"] < 1)
    assert surely.sum() <= 3, "of 16 intervals of 95 %"
    with pytest.raises(MoELensError, match="this model has one only"):
        ExpertPaths().update(records[0]).table()


def by_definition(records, expert: int, *, bigrams: bool) -> float:
    """What tokens, or bigrams, tell of an expert, from its formula, token by token."""
    seen = []
    for record in records:
        [routing] = record.routing.values()
        groups = groups_of(record.ids).tolist()
        for row, group in enumerate(groups):
            before = None
            for place in range(record.input_ids.shape[1]):
                if record.attention_mask[row, place]:
                    word = int(record.input_ids[row, place])
                    seen.append((group, word, (before, word), float(expert in routing.indices[row, place].tolist())))
                    before = word
    model = none = 0.0
    for group in range(10):
        others = [one for one in seen if one[0] != group]
        for _, word, pair, y in (one for one in seen if one[0] == group):
            m = np.mean([one[3] for one in others])
            alike = [one[3] for one in others if one[1] == word]
            p = (sum(alike) + m) / (len(alike) + 1)
            if bigrams:
                alike = [one[3] for one in others if one[2] == pair]
                p = (sum(alike) + p) / (len(alike) + 1)
            model, none = model + (y - p) ** 2, none + (y - m) ** 2
    return 1 - model / none


def test_what_tokens_tell_is_its_formula_token_by_token():
    words = in_words(3)
    experts = torch.where((words % 2 == 0)[..., None], noise(4), torch.tensor([0, 3]))
    given = [taken(words, experts), taken(in_words(5, batch=3), noise(6, batch=3), ONE_OF_EACH[:3])]
    padded = replace(given[1], attention_mask=given[1].attention_mask.clone())
    padded.attention_mask[0, :20] = 0
    whole = TokenBaseline().update(given[0]).update(padded)
    table = whole.table()
    for expert in range(4):
        assert table.loc[expert, "token"] == pytest.approx(by_definition([given[0], padded], expert, bigrams=False))
        assert table.loc[expert, "bigram"] == pytest.approx(by_definition([given[0], padded], expert, bigrams=True))
    assert (table["tokens"] == 300 + 70).all()
    merged = TokenBaseline().merge(TokenBaseline().update(padded)).update(given[0]).table()
    pd.testing.assert_frame_equal(merged, table)


def test_a_token_that_decides_tells_all_and_noise_tells_nothing():
    words = in_words(7)
    decided = torch.stack([words, (words + 1) % 4], -1)
    told = TokenBaseline().update(taken(words, decided)).table()
    assert (told["token"] > 0.95).all()
    assert (told["known_tokens"] == 1).all(), "every word is in other examples, too"
    before = words.roll(1, dims=1)
    before[:, 0] = 0
    by_pair = TokenBaseline().update(taken(words, torch.stack([before, (before + 1) % 4], -1))).table()
    assert (by_pair["token"] < 0.1).all()
    assert (by_pair["bigram"] > 0.7).all()
    nothing = TokenBaseline().update(taken(in_words(8, words=300), noise(9))).table()
    assert (nothing[["token", "bigram"]] < 0.05).all(axis=None), "what is known by heart of rare tokens does not count"
    assert nothing["known_tokens"].iloc[0] < 0.7
    alone = TokenBaseline().update(taken(words[:1], decided[:1], ONE_OF_EACH[:1])).table()
    assert alone[["token", "bigram", "known_tokens"]].isna().all(axis=None), "no other examples to learn from"


def test_few_bigrams_are_the_same_whatever_the_order_and_the_others_are_told_by_their_token():
    words, experts = in_words(10, words=12), noise(11)
    one = [taken(words[n : n + 2], experts[n : n + 2], ONE_OF_EACH[n : n + 2]) for n in range(0, 10, 2)]
    forth, back = TokenBaseline(bigrams=5), TokenBaseline(bigrams=5)
    for first, last in zip(one, reversed(one), strict=True):
        forth.update(first)
        back.update(last)
    pd.testing.assert_frame_equal(forth.table(), back.table())
    table, every = forth.table(), TokenBaseline().update(taken(words, experts)).table()
    assert table["token"].tolist() == pytest.approx(every["token"].tolist())
    assert 0 < table["known_bigrams"].iloc[0] < every["known_bigrams"].iloc[0]
    assert (table["bigram"] - table["token"]).abs().max() < (every["bigram"] - every["token"]).abs().max()


def places(record, layer: int, expert: int):
    """Every place of an expert: weight, id, position, and the last four tokens."""
    routing: Routing = record.routing[layer]
    for row, name in enumerate(record.ids):
        start = int(record.attention_mask[row].argmax())
        for place in range(start, record.input_ids.shape[1]):
            chosen = routing.indices[row, place].tolist()
            if expert in chosen:
                last = tuple(record.input_ids[row, max(start, place - 3) : place + 1].tolist())
                yield float(routing.weights[row, place, chosen.index(expert)]), name, place - start, last


def test_top_contexts_are_the_places_of_the_highest_weights():
    whole = TopContexts(3, before=4, after=2).update(RECORDS[0]).update(RECORDS[1])
    table = whole.table()
    for (layer, expert), rows in table.groupby(["layer", "expert"]):
        best: dict = {}
        for record in RECORDS:
            for weight, name, position, last in places(record, layer, expert):
                best[last] = max(best.get(last, (0, "", 0)), (weight, name, position))
        expected = sorted(best.values(), reverse=True)[:3]
        assert rows["weight"].tolist() == pytest.approx([weight for weight, *_ in expected])
        assert rows["rank"].tolist() == list(range(len(expected)))
        found = list(zip(rows["id"], rows["position"], strict=True))
        assert found == [(name, position) for _, name, position in expected]
    with pytest.raises(MoELensError):
        TopContexts(3, before=4, after=2).merge(TopContexts(3, before=4, after=1))
    merged = TopContexts(3, before=4, after=2).merge(TopContexts(3, before=4, after=2).update(RECORDS[1]))
    pd.testing.assert_frame_equal(merged.update(RECORDS[0]).table(), table)


def test_a_context_has_the_tokens_around_and_the_weight_at_each():
    words = [[9, 8, 7, 6, 5]]
    given = routed([[[0, 1], [1, 2], [3, 0], [1, 0], [2, 1]]], "a", words=words)
    [row] = TopContexts(1, before=1, after=2).update(given).table().query("expert == 3").to_dict("records")
    assert (row["id"], row["position"], row["place"]) == ("a", 2, 1)
    assert row["token_ids"] == [8, 7, 6, 5]
    assert row["weights"] == pytest.approx([0, 0.9, 0, 0])
    [row] = TopContexts(1, before=3, after=0).update(given).table().query("expert == 0").to_dict("records")
    assert (row["position"], row["place"], row["token_ids"]) == (0, 0, [9]), "no pads before the first token"


def test_fixed_words_of_a_prompt_are_one_context():
    words = [[1, 2, 3, 4, one] for one in (5, 6, 7)]
    given = routed([[[0, 1]] * 4 + [[1, 0]]] * 3, "abc", words=words)
    table = TopContexts(9).update(given).table().query("expert == 0")
    assert len(table) == 4 + 3, "the four fixed places once, and the last of each text"
    assert table["weight"].tolist() == pytest.approx([0.9] * 4 + [0.1] * 3)


def test_router_similarity_is_the_cosine_of_the_routers_rows(lens):
    table = router_similarity(lens).set_index(["layer", "expert", "other"])["similarity"]
    layer = lens.architecture.moe_layers[-1]
    rows = lens.module.get_submodule(lens.architecture.at(layer).router).weight.detach()
    assert table[layer, 1, 4] == pytest.approx(float(cosine_similarity(rows[1], rows[4], dim=0)), abs=1e-5)
    assert table[layer, 4, 1] == pytest.approx(table[layer, 1, 4])
