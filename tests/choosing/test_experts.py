"""ExpertSet: normal form, set algebra, text forms, selection rules and random controls."""

import json
import re

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet, cumulative_order
from moe_lens.lens.interventions import Renormalize, Reroute, Zero
from moe_lens.tuning import TuneExperts

UNTIMED = settings(deadline=None)  # a busy machine is no failure
LAYERS = st.dictionaries(st.integers(0, 60), st.lists(st.integers(0, 255), max_size=8), max_size=6)
SETS = LAYERS.map(ExpertSet.of)


def scores(rows: dict[int, list[float]]) -> pd.DataFrame:
    cells = [(layer, expert, s) for layer, row in rows.items() for expert, s in enumerate(row)]
    return pd.DataFrame(cells, columns=["layer", "expert", "score"])


def test_equal_choices_are_equal_however_they_were_written():
    assert ExpertSet.of({4: [0], 3: [7, 5, 5], 9: []}) == ExpertSet.of({3: (5, 7), 4: {0}})
    assert len({ExpertSet.of({1: [2, 1]}), ExpertSet.of({1: [1, 2]})}) == 1
    assert ExpertSet.of({4: [0], 3: [7, 5]}).members == ((3, (5, 7)), (4, (0,)))


def test_reads_like_a_mapping_and_iterates_like_a_set_of_pairs():
    experts = ExpertSet.of({3: [7, 5], 4: [0]})
    assert (experts[3], experts[8], experts.layers) == ((5, 7), (), (3, 4))
    assert list(experts) == [(3, 5), (3, 7), (4, 0)]
    assert len(experts) == 3
    assert (3, 7) in experts
    assert (4, 7) not in experts
    assert (8, 0) not in experts
    assert experts.restrict([4, 5]) == ExpertSet.of({4: [0]})


@UNTIMED
@given(SETS, SETS)
def test_algebra_equals_the_algebra_of_pairs(a, b):
    assert set(a | b) == set(a) | set(b)
    assert set(a & b) == set(a) & set(b)
    assert set(a - b) == set(a) - set(b)
    assert (a & b) | (a - b) == a
    assert all(ids for _, ids in (a - b).members)


@UNTIMED
@given(SETS)
def test_text_forms_round_trip(experts):
    assert ExpertSet.parse(str(experts)) == experts
    assert ExpertSet.from_json(experts.to_json()) == experts
    assert json.loads(experts.to_json()) == {str(layer): list(ids) for layer, ids in experts.members}


def test_a_set_is_shown_as_text_of_up_to_60_characters():
    short, long = (ExpertSet.of({10: range(10, 28), 1: ids}) for ids in ([0], [10]))
    assert (len(str(short)), len(str(long))) == (60, 61)
    assert repr(short) == f"ExpertSet('{short}')"
    assert repr(long) == "ExpertSet(19 experts in 2 layers)"


def test_literal_form():
    assert str(ExpertSet.of({4: [0], 3: [7, 5]})) == "3:5,7;4:0"
    assert ExpertSet.parse(" 3 : 5, 7 ; 4:0; ") == ExpertSet.of({3: [5, 7], 4: [0]})


@pytest.mark.parametrize("text", ["3", "3:", "x:1", "3:1,,2", "3:-1", "3:1;3:2", "3:1.5"])
def test_broken_literals_are_refused(text):
    with pytest.raises(MoELensError):
        ExpertSet.parse(text)


@pytest.mark.parametrize(
    "text",
    ["{", '{"a": [1]}', '{"3": 1}', '{"3": [1.5]}', '{"3": ["1"]}', '{"3": [1], "3": [2]}', '{"-1": [2]}'],
)
def test_broken_json_is_refused(text):
    with pytest.raises(MoELensError):
        ExpertSet.from_json(text)


def test_overlap_is_the_shared_share_of_equally_large_sets():
    a, b = ExpertSet.of({0: [1, 2], 1: [3, 4]}), ExpertSet.of({0: [2, 1], 1: [4, 5]})
    assert a.overlap(b) == b.overlap(a) == 0.75
    with pytest.raises(MoELensError, match="4 and 1"):
        a.overlap(ExpertSet.of({0: [1]}))
    with pytest.raises(MoELensError, match="0 and 0"):
        ExpertSet().overlap(ExpertSet())


def test_top_takes_the_highest_of_each_layer_and_the_lower_id_of_equals():
    table = scores({2: [0.1, 0.4, 0.4, 0.1], 5: [0.3, 0.2, 0.2, 0.3]}).sample(frac=1, random_state=1)
    assert ExpertSet.top(table, 1) == ExpertSet.of({2: [1], 5: [0]})
    assert ExpertSet.top(table, 3) == ExpertSet.of({2: [0, 1, 2], 5: [0, 1, 3]})
    renamed = table.rename(columns={"score": "gain"})
    assert ExpertSet.top(renamed, 1, score="gain") == ExpertSet.of({2: [1], 5: [0]})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (scores({0: [0.1, 0.2]}).drop(columns="score"), "lacks the column(s) ['score']"),
        (scores({}), "no rows"),
        (scores({0: [0.1, float("nan")]}), "not finite"),
        (pd.concat([scores({0: [0.1, 0.2]})] * 2), "repeat"),
        (scores({0: [0.1, 0.2], 1: [0.3]}), "between 1 and 1"),
    ],
)
def test_top_refuses_tables_it_cannot_rank(table, message):
    with pytest.raises(MoELensError, match=re.escape(message)):
        ExpertSet.top(table, 2)


def test_cumulative_includes_the_expert_that_crosses_and_stops_at_equality():
    table = scores({0: [0.25, 0.5, 0.125, 0.125]})
    assert cumulative_order(table, 0.4) == {0: (1,)}
    assert cumulative_order(table, 0.5) == {0: (1,)}
    assert cumulative_order(table, 0.51) == {0: (1, 0)}
    assert cumulative_order(table, 1.0) == {0: (1, 0, 2, 3)}
    even = pd.DataFrame({"layer": 0, "expert": range(10), "score": 0.1})
    assert len(cumulative_order(even, 0.8)[0]) == 8, "0.1 eight times is 0.7999999999999999 in floats"
    assert ExpertSet.cumulative(table, 0.8) == ExpertSet.of({0: [0, 1, 2]})
    with pytest.raises(MoELensError, match="above 0 and at most 1"):
        ExpertSet.cumulative(table, 0)


@UNTIMED
@given(SETS, st.integers(0, 2**31))
def test_random_controls_match_sizes_and_commute_with_restriction(experts, seed):
    control = ExpertSet.random_like(experts, seed, n_experts=256)
    assert [(layer, len(ids)) for layer, ids in control.members] == [
        (layer, len(ids)) for layer, ids in experts.members
    ]
    assert control == ExpertSet.random_like(experts, seed, n_experts=256)
    part = experts.layers[:2]
    assert control.restrict(part) == ExpertSet.random_like(experts.restrict(part), seed, n_experts=256)


def test_random_controls_vary_with_seed_and_layer_and_cover_all_experts():
    experts = ExpertSet.of({0: [0, 1], 1: [0, 1]})
    drawn = [ExpertSet.random_like(experts, seed, n_experts=6) for seed in range(200)]
    assert {expert for control in drawn for expert in control[0]} == set(range(6))
    assert any(control[0] != control[1] for control in drawn)
    with pytest.raises(MoELensError, match="below n_experts = 1"):
        ExpertSet.random_like(experts, 0, n_experts=1)


@pytest.mark.parametrize("layers", [{-1: [0]}, {0: [-2]}, {0: [1.0]}, {"0": [1]}])
def test_numbers_that_name_no_expert_are_refused(layers):
    with pytest.raises(MoELensError):
        ExpertSet.of(layers)


@pytest.mark.parametrize("members", [{0: [1, 2]}, ((0, [1, 2]),), (0, 1), "0:1"])
def test_a_set_that_was_not_made_by_its_ways_is_refused(members):
    with pytest.raises(MoELensError, match=r"ExpertSet\.of"):
        ExpertSet(members)


@pytest.mark.parametrize("kind", [Zero, Renormalize, Reroute, TuneExperts])
@pytest.mark.parametrize("value", [{0: [1, 2]}, "0:1,2", None])
def test_what_takes_experts_says_what_it_expects(kind, value):
    with pytest.raises(MoELensError, match="expected an ExpertSet, such as"):
        kind(value)


def test_scores_that_are_equal_at_the_published_decimals_are_ties_for_esft():
    table = pd.DataFrame({"layer": 0, "expert": [0, 1, 2], "score": [0.30001, 0.30004, 0.39995]})
    assert cumulative_order(table, 0.5) == {0: (2, 0)}
