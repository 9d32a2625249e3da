"""Gains, divergence and overlap of two models by hand, and their intervals against numpy's own arithmetic."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import entropy

from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.metrics import (
    UNBOUNDED,
    answer_probability_gain,
    attention_gain,
    bootstrap_interval,
    example_means,
    expert_overlap,
    paired_difference,
    peak_lead,
    routing_divergence,
)
from moe_lens.metrics.divergence import jensen_shannon


def masses(values: dict[tuple[int, str], float]) -> pd.DataFrame:
    rows = [(layer, 0, "context", name, mass) for (layer, name), mass in values.items()]
    return pd.DataFrame(rows, columns=["layer", "step", "target", "id", "mass"])


BASE = masses({(0, "a"): 0.1, (0, "b"): 0.4, (0, "c"): 0.0, (1, "a"): 0.2, (1, "b"): 0.2, (1, "c"): 0.2})
TUNED = masses({(0, "a"): 0.3, (0, "b"): 0.2, (0, "c"): 0.1, (1, "a"): 0.1, (1, "b"): 0.2, (1, "c"): 0.6})


def test_a_hand_case_of_two_layers():
    gains = attention_gain(BASE, TUNED.sample(frac=1, random_state=0)).set_index("layer")
    assert gains["n"].tolist() == [3, 3]
    assert gains["undefined"].tolist() == [1, 0]
    assert gains["gain"].tolist() == pytest.approx([(2 - 0.5) / 2, (-0.5 + 0 + 2) / 3])
    assert gains["median"].tolist() == pytest.approx([0.75, 0])
    assert gains["ratio_of_means"].tolist() == pytest.approx([0.1 / 0.5, 0.3 / 0.6])
    assert gains[["base", "tuned"]].to_numpy().tolist() == pytest.approx(np.array([[0.5, 0.6], [0.6, 0.9]]) / 3)


def by_layer(column: str, values: dict[str, list[float]]) -> pd.DataFrame:
    """A table of one row per example and layer."""
    rows = [(layer, name, value) for name, own in values.items() for layer, value in enumerate(own)]
    return pd.DataFrame(rows, columns=["layer", "id", column])


def test_the_lead_of_a_peak_is_that_of_the_ratios_of_means_over_the_examples_that_both_have():
    # The context's mean goes from 2 to 3, 6 and 3 in three layers; the answer's from .3 to .3, .35 and .5.
    context = by_layer("mass", {"a": [1, 1, 1], "b": [3, 3, 3]}), by_layer("mass", {"a": [2, 11, 2], "b": [4, 1, 4]})
    answer = (
        by_layer("probability", {"a": [0.2] * 3, "b": [0.4] * 3, "c": [1.0] * 3}),
        by_layer("probability", {"a": [0.2, 0.4, 0.2], "b": [0.4, 0.3, 0.8], "c": [9.0, 0.0, 0.0]}),
    )
    found = peak_lead(context, answer, values=("mass", "probability"), resamples=4000)
    assert (found["n"], found["first_peak"], found["second_peak"], found["lead"]) == (2, 1, 2, 1)
    # Of four equally likely draws: aa peaks at layers 1 and 1; ab, ba at 1 and 2; bb at 0 (a tie with 2) and 2.
    assert found["earlier"] == pytest.approx(3 / 4, abs=0.03)
    assert (found["lead_low"], found["lead_high"]) == (0, 2)
    swapped = peak_lead(answer, context, values=("probability", "mass"), resamples=100)
    assert swapped["lead"] == -1
    with pytest.raises(MoELensError, match="1 examples are shared, and the layers are"):
        fewer = tuple(table[(table["id"] == "a") & (table["layer"] < 2)] for table in answer)
        peak_lead(context, fewer, values=("mass", "probability"))
    with pytest.raises(MoELensError, match="mean is above 0 in every layer"):
        peak_lead((context[0].assign(mass=0.0), context[1]), answer, values=("mass", "probability"))


def test_intervals_of_many_examples_are_about_those_of_resampled_ones():
    rng = np.random.default_rng(1)
    before, after = rng.uniform(0.1, 1, 400), rng.uniform(0.1, 1, 400)
    tables = [masses({(2, f"e{i:03}"): v for i, v in enumerate(values)}) for values in (before, after)]
    gains = attention_gain(*tables, resamples=4000).iloc[0]
    draws = np.random.default_rng(2).integers(0, 400, (4000, 400))
    ratios = (after / before - 1)[draws]
    own = {
        "gain": ratios.mean(1),
        "median": np.median(ratios, axis=1),
        "ratio_of_means": after[draws].mean(1) / before[draws].mean(1) - 1,
    }
    for name, values in own.items():
        width = np.ptp(np.quantile(values, [0.025, 0.975]))
        assert [gains[f"{name}_low"], gains[f"{name}_high"]] == pytest.approx(
            np.quantile(values, [0.025, 0.975]), abs=0.15 * width
        )
        assert gains[f"{name}_low"] < gains[name] < gains[f"{name}_high"]


def test_equal_ratios_tell_no_spread_and_few_no_interval_of_their_median():
    base, tuned = (masses({(0, f"e{i}"): v for i in range(5)}) for v in (0.25, 0.5))
    row = attention_gain(base, tuned).iloc[0]
    assert row[["gain", "median", "ratio_of_means"]].tolist() == [1, 1, 1]
    assert row[["gain_low", "gain_high", "median_low", "median_high", "ratio_of_means_low"]].isna().all()


def test_resampling_in_chunks_changes_nothing(monkeypatch):
    whole = attention_gain(BASE, TUNED)
    monkeypatch.setattr("moe_lens.metrics.resampling.CHUNK_CELLS", 7)
    pd.testing.assert_frame_equal(attention_gain(BASE, TUNED), whole)


def test_without_any_denominator_there_is_no_gain():
    zero = masses({(0, "a"): 0.0, (0, "b"): 0.0})
    row = attention_gain(zero, zero).iloc[0]
    assert row["undefined"] == 2
    assert row[["gain", "gain_low", "median", "ratio_of_means", "ratio_of_means_high"]].isna().all()


def test_probability_gains_are_per_layer_and_way_of_counting():
    base = pd.DataFrame({"layer": 1, "tokens": ["first", "joint"], "id": "a", "probability": [0.2, 0.01]})
    tuned = base.assign(probability=[0.3, 0.04])
    gains = answer_probability_gain(base, tuned).set_index("tokens")["gain"]
    assert gains.to_dict() == pytest.approx({"first": 0.5, "joint": 3.0})


@pytest.mark.parametrize(
    ("tuned", "message"),
    [
        (TUNED.iloc[1:], "6 and 5 rows, 5 shared"),
        (TUNED.assign(id=TUNED["id"] + "x"), "0 shared"),
        (pd.concat([TUNED, TUNED.iloc[:1]]), "repeats in the table of the tuned"),
        (TUNED.drop(columns="mass"), "tuned model's table has no mass"),
        (TUNED.assign(mass=np.nan), "finite"),
        (TUNED.assign(mass=-0.5), "at least 0"),
        (TUNED.assign(mass=TUNED["mass"].where(TUNED["id"] != "b", np.inf)), "finite"),
        (TUNED.assign(mass=TUNED["mass"].where(TUNED["id"] != "b", -0.5)), "at least 0"),
    ],
)
def test_tables_that_cannot_be_paired_are_refused(tuned, message):
    with pytest.raises(MoELensError, match=message):
        attention_gain(BASE, tuned)


def rates(vectors: dict[str, list[float]]) -> pd.DataFrame:
    rows = [(name, 4, expert, rate, 10) for name, own in vectors.items() for expert, rate in enumerate(own)]
    return pd.DataFrame(rows, columns=["id", "layer", "expert", "rate", "tokens"])


def test_divergence_is_that_of_each_examples_use():
    first = rates({"a": [1, 1, 0, 0], "b": [1, 0.5, 0.5, 0]})
    second = rates({"a": [0, 0, 1, 1], "b": [1, 0.5, 0.5, 0]})
    row = routing_divergence(first, second).iloc[0]
    assert (row["layer"], row["n"], row["divergence"]) == (4, 2, pytest.approx(0.5))  # disjoint use is 1 bit, equal 0
    p, q = np.array([0.5, 0.375, 0.125, 0]), np.array([0.25, 0.125, 0.375, 0.25])
    by_entropy = entropy((p + q) / 2, base=2) - (entropy(p, base=2) + entropy(q, base=2)) / 2
    assert row["pooled"] == pytest.approx(by_entropy)
    same = routing_divergence(first, first).iloc[0]
    assert same[["divergence", "divergence_low", "pooled"]].tolist() == [0, 0, 0]
    assert same["divergence_high"] == pytest.approx(1 - 0.025 ** (1 / 2))  # two examples leave much open


def test_divergence_of_an_example_that_uses_none_of_the_experts_is_refused():
    given = rates({"a": [1, 1, 0, 0], "b": [1, 0.5, 0.5, 0]})
    one_unused = given.assign(rate=given["rate"].where(given["id"] == "a", 0.0))
    for first, second in ((given, one_unused), (one_unused, one_unused)):
        with pytest.raises(MoELensError, match="1 of 2 rows of rates are all 0"):
            routing_divergence(first, second)


def test_divergence_of_almost_equal_use_is_not_below_zero():
    rng = np.random.default_rng(0)
    uses = rng.random((200, 16))
    found = jensen_shannon(uses, uses * (1 + 1e-15 * rng.standard_normal((200, 16))))
    assert (found >= 0).all()
    assert found.max() < 1e-12


def test_overlap_is_counted_against_chance():
    first, second = ExpertSet.of({0: [0, 1, 2], 1: [5]}), ExpertSet.of({0: [1, 2, 7], 1: [6]})
    table = expert_overlap(first, second, n_experts=8).set_index("layer")
    assert table.loc[0, ["first", "second", "shared"]].tolist() == [3, 3, 2]
    assert table.loc[0, ["overlap", "jaccard", "expected"]].tolist() == pytest.approx([2 / 3, 1 / 2, 3 / 8])
    assert table.loc[0, "p_value"] == pytest.approx((3 * 5 + 1) / 56)  # of the 56 triples, 15 share two, 1 all three
    assert table.loc[1, ["shared", "p_value"]].tolist() == [0, 1]
    with pytest.raises(MoELensError, match="same layers"):
        expert_overlap(first, ExpertSet.of({0: [1]}), n_experts=8)
    with pytest.raises(MoELensError, match="beyond the 4"):
        expert_overlap(first, second, n_experts=4)


def test_the_jaccard_index_is_what_both_have_over_what_one_has():
    first, second = ExpertSet.of({0: [1, 2], 1: [3]}), ExpertSet.of({0: [2], 1: [3, 4, 5]})
    assert first.jaccard(second) == second.jaccard(first) == 2 / 5
    assert first.jaccard(first) == 1
    assert math.isnan(ExpertSet().jaccard(ExpertSet()))


def test_shares_of_examples_have_means_and_paired_differences_with_intervals():
    rng = np.random.default_rng(0)
    ids = [f"{place}" for place in range(40)]
    before = pd.DataFrame({"layer": 1, "id": ids, "mass": rng.uniform(0.2, 0.6, 40)})
    after = before.assign(mass=before["mass"] + rng.uniform(0.0, 0.2, 40)).sample(frac=1, random_state=0)
    [row] = paired_difference(before, after, value="mass", by=["layer"]).to_dict("records")
    moved = after.sort_index()["mass"].to_numpy() - before["mass"].to_numpy()
    expected = bootstrap_interval(moved, bounds=(-1, 1), resamples=2000)
    assert (row["n"], row["layer"]) == (40, 1)
    assert row["second"] - row["first"] == pytest.approx(row["difference"]) == pytest.approx(moved.mean())
    assert (row["difference_low"], row["difference_high"]) == pytest.approx((expected.low, expected.high))
    [mean] = example_means(before, value="mass", by=["layer"]).to_dict("records")
    assert mean["mass"] == pytest.approx(before["mass"].mean())
    assert mean["mass_low"] < mean["mass"] < mean["mass_high"]
    with pytest.raises(MoELensError, match="expected the same examples"):
        paired_difference(before, after.iloc[1:], value="mass", by=["layer"])
    nats, below = (table.assign(nats=np.log(table["mass"])) for table in (after, before))
    [row] = paired_difference(below, nats, value="nats", by=["layer"], bounds=UNBOUNDED).to_dict("records")
    ratios = np.log(after.sort_index()["mass"].to_numpy() / before["mass"].to_numpy())
    expected = bootstrap_interval(ratios, bounds=UNBOUNDED, resamples=2000)
    assert (row["first"], row["difference"]) == pytest.approx((below["nats"].mean(), ratios.mean()))
    assert (row["difference_low"], row["difference_high"]) == pytest.approx((expected.low, expected.high))


def test_a_share_that_rounding_pushed_beyond_its_bounds_is_at_them():
    table = pd.DataFrame({"layer": 0, "id": ["a", "b"], "mass": [1 + 1e-6, -1e-8]})
    assert example_means(table, value="mass", by=["layer"])["mass"].tolist() == [0.5]
