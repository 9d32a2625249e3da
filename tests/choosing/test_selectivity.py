"""Selectivity: shares of scores that are lost, the ratio of spared to hit, and what each verdict needs."""

import numpy as np
import pandas as pd
import pytest

from moe_lens import ExpertSet, MoELensError
from moe_lens.choosing import Choice, selectivity
from moe_lens.choosing.controls import against_random
from moe_lens.choosing.masking import Masked, joined, masking_rows
from moe_lens.metrics import Metric, bootstrap_interval

N = 200
SETS = [f"random:1#{number}" for number in range(5)]


def table(right: dict[str, dict[str, float]]) -> Masked:
    """Of {task: {intervention: share of right answers}}; wrong ones come last, so that answers are paired."""
    found = {}
    for task, shares in right.items():
        rows = [
            (name, str(i), float(i < round(share * N)), name == "none")
            for name, share in (dict.fromkeys(SETS, 0.9) | shares).items()
            for i in range(N)
        ]
        answers = pd.DataFrame(rows, columns=["intervention", "id", "em", "same"]).assign(f1=1.0, memory=0.0)
        answers = answers.assign(memory_ratio=0.0)
        names = [name for name in dict.fromkeys(answers["intervention"]) if name != "none"]
        choices = [
            Choice(name, "random" if name in SETS else "ce", ExpertSet.of({0: [i]})) for i, name in enumerate(names)
        ]
        found[task] = Masked(answers, masking_rows(answers, choices, "zero"))
    return joined(found)


def judged(right: dict[str, dict[str, float]], **rest) -> pd.DataFrame:
    masked = table(right)
    spared = [task for task in right if task.startswith("kept")]
    return selectivity(
        masked.answers, masked.rows, targets=[task for task in right if task not in spared], spared=spared, **rest
    ).set_index(["intervention", "task"])


def test_the_effect_is_the_share_of_the_unmasked_score_that_is_lost():
    found = judged({"swap": {"none": 0.8, "mask": 0.2}, "kept": {"none": 0.5, "mask": 0.45}})
    assert found.loc[("mask", "swap"), ["unmasked", "score", "effect", "role"]].tolist() == pytest.approx(
        [0.8, 0.2, 0.75, "target"]
    )
    row = found.loc[("mask", "kept")]
    assert row[["effect", "ratio"]].tolist() == pytest.approx([0.1, 0.1 / 0.75])
    assert row["effect_low"] < 0.1 < row["effect_high"] < 0.2
    assert row["ratio_low"] < row["ratio"] < row["ratio_high"] < 1 / 3
    assert row[["worst", "verdict"]].tolist() == ["kept", "selective"]
    assert "random:1#0" not in found.index.get_level_values(0), "controls are judged"


def test_the_interval_of_an_effect_covers_that_of_a_bootstrap_over_examples_and_hardly_more():
    found = judged({"swap": {"none": 0.8, "mask": 0.3}, "kept": {"none": 0.9, "mask": 0.9}}).loc["mask"]
    right = np.arange(N)[None] < np.array([[0.8 * N], [0.3 * N]])
    rng = np.random.default_rng(1)
    drawn = right[:, rng.integers(0, N, (10_000, N))].mean(-1)
    low, high = np.quantile(1 - drawn[1] / drawn[0], [0.025, 0.975])
    assert low - 0.02 < found.loc["swap", "effect_low"] < low + 0.005
    assert high - 0.005 < found.loc["swap", "effect_high"] < high + 0.02
    nothing_lost = found.loc["kept"]
    assert nothing_lost["effect"] == 0
    assert nothing_lost["effect_low"] < -0.005 < 0.005 < nothing_lost["effect_high"], "an interval of no width"


def test_the_worst_spared_task_counts_against_the_weakest_target():
    found = judged(
        {
            "swap": {"none": 1.0, "mask": 0.2},
            "novel": {"none": 1.0, "mask": 0.5},
            "kept": {"none": 1.0, "mask": 1.0},
            "kept too": {"none": 1.0, "mask": 0.7},
        }
    ).loc["mask"]
    assert found["ratio"].tolist() == pytest.approx([0.3 / 0.5] * 4)
    assert set(found["worst"]) == {"kept too"}
    assert set(found["verdict"]) == {"not selective"}


@pytest.mark.parametrize(
    ("swap", "kept", "verdict"),
    [
        ({"none": 0.9, "mask": 0.1}, {"none": 0.9, "mask": 0.88}, "selective"),
        ({"none": 0.9, "mask": 0.6}, {"none": 0.9, "mask": 0.82}, "selective, not certain"),
        ({"none": 0.9, "mask": 0.1}, {"none": 0.9, "mask": 0.5}, "not selective"),
        ({"none": 0.9, "mask": 0.88}, {"none": 0.9, "mask": 0.9}, "as random sets"),
        ({"none": 0.9, "mask": 0.1, **dict.fromkeys(SETS, 0.1)}, {"none": 0.9, "mask": 0.9}, "as random sets"),
        ({"none": 0.0, "mask": 0.5}, {"none": 0.9, "mask": 0.9}, "nothing to lose"),
    ],
)
def test_a_verdict_needs_more_than_random_sets_and_a_small_ratio_with_its_interval(swap, kept, verdict):
    assert set(judged({"swap": swap, "kept": kept})["verdict"]) == {verdict}


def test_without_random_sets_nothing_is_called_selective():
    masked = table({"swap": {"none": 0.9, "mask": 0.1}, "kept": {"none": 0.9, "mask": 0.9}})
    rows = masked.rows.drop(columns=[name for name in masked.rows if "random" in name])
    found = selectivity(masked.answers, rows, targets=["swap"], spared=["kept"])
    assert set(found["verdict"]) == {"no random sets"}


def test_the_threshold_is_the_plans():
    strict = judged({"swap": {"none": 0.9, "mask": 0.1}, "kept": {"none": 0.9, "mask": 0.8}}, threshold=0.05)
    assert set(strict["verdict"]) == {"not selective"}


def test_a_task_on_both_sides_or_without_answers_is_refused():
    masked = table({"swap": {"none": 0.9, "mask": 0.1}})
    for targets, spared in ((["swap"], ["swap"]), (["swap"], ["kept"]), (["swap"], [])):
        with pytest.raises(MoELensError, match="expected targets and spared tasks of their own, all answered"):
            selectivity(masked.answers, masked.rows, targets=targets, spared=spared)


def in_nats(means: dict[str, dict[str, float]], metric="logit_difference", *, spread=1.0, share=False):
    """A made run and its verdicts, of {task: {intervention: mean}}, each example's own level under all of them."""
    found, rng = {}, np.random.default_rng(0)
    judged = metric if metric == "logit_difference" else Metric(metric, "made", "here", "answer", float, bounds=None)
    for task, of_task in means.items():
        own, names = rng.normal(0, 3, N), dict.fromkeys(SETS, 0.0) | of_task
        values = {name: own + mean + rng.normal(0, spread, N) for name, mean in names.items()}
        values = {name: (value > 0).astype(float) for name, value in values.items()} if share else values
        answers = pd.concat([pd.DataFrame({"intervention": name, metric: value}) for name, value in values.items()])
        chosen = [
            Choice(name, "random" if name in SETS else "ce", ExpertSet.of({0: [i]})) for i, name in enumerate(names)
        ]
        drawn = [one for one in chosen if one.name in SETS]
        own = [one for one in chosen if one.name == "mask"]
        rows = pd.DataFrame([{"intervention": one.name, "set": one.name, "family": one.family} for one in chosen])
        summary = against_random(answers, own, drawn, metric, bounds=None).assign(metric=metric)
        found[task] = Masked(answers, rows[rows["intervention"] != "none"], summary)
    masked = joined(found)
    spared = [task for task in means if task.startswith("kept")]
    targets = [task for task in means if task not in spared]
    told = selectivity(
        masked.answers, masked.rows, targets=targets, spared=spared, metric=judged, summary=masked.summary
    )
    return masked, told.set_index(["intervention", "task"])


def test_of_a_metric_without_bounds_the_drop_in_its_own_unit_is_what_is_lost():
    """A share of it would mean nothing: the unmasked means here are about 0, so that it would be endless."""
    masked, found = in_nats({"swap": {"none": 0.0, "mask": -4.0}, "kept": {"none": 0.0, "mask": -0.5}})
    assert set(found["measure"]) == {"drop"}
    whole = masked.answers.set_index(["task", "intervention"])["logit_difference"]
    for task in ("swap", "kept"):
        lost = whole[task]["none"].to_numpy() - whole[task]["mask"].to_numpy()
        row, expected = found.loc[("mask", task)], bootstrap_interval(lost)
        assert row[["effect", "unmasked"]].tolist() == pytest.approx([lost.mean(), whole[task]["none"].mean()])
        ends = row[["effect_low", "effect_high"]].tolist()
        assert ends == pytest.approx([expected.low, expected.high], abs=0.02)
    row = found.loc[("mask", "kept")]
    assert row["ratio"] == pytest.approx(row["effect"] / found.loc[("mask", "swap"), "effect"])
    assert set(found["verdict"]) == {"selective"}


def test_the_ratio_of_drops_has_the_interval_of_a_plain_bootstrap_over_examples():
    masked, found = in_nats({"swap": {"none": 0.0, "mask": -2.0}, "kept": {"none": 0.0, "mask": -0.6}}, spread=2.0)
    whole = masked.answers.set_index(["task", "intervention"])["logit_difference"]
    lost = {task: (whole[task]["none"].to_numpy() - whole[task]["mask"].to_numpy()) for task in ("swap", "kept")}
    rng = np.random.default_rng(1)
    means = {task: one[rng.integers(0, N, (10_000, N))].mean(-1) for task, one in lost.items()}
    low, high = np.quantile(means["kept"] / means["swap"], [0.025, 0.975])
    row = found.loc[("mask", "kept")]
    assert row[["ratio_low", "ratio_high"]].tolist() == pytest.approx([low, high], abs=0.02)
    assert set(found["verdict"]) == {"selective, not certain"}


@pytest.mark.parametrize(
    ("swap", "kept", "verdict"),
    [
        ({"none": 0.0, "mask": -4.0}, {"none": 0.0, "mask": -3.0}, "not selective"),
        ({"none": 0.0, "mask": 0.0}, {"none": 0.0, "mask": 0.0}, "as random sets"),
        ({"none": 0.0, "mask": -4.0, **dict.fromkeys(SETS, -4.0)}, {"none": 0.0, "mask": 0.0}, "as random sets"),
        ({"none": 0.0, "mask": -4.0}, {"none": 0.0, "mask": 3.0}, "selective"),
    ],
)
def test_verdicts_on_drops_need_what_those_on_shares_need(swap, kept, verdict):
    _, found = in_nats({"swap": swap, "kept": kept})
    assert set(found["verdict"]) == {verdict}


def test_a_function_of_ones_own_is_a_share_where_it_gives_0_and_1_and_else_a_drop():
    means = {"swap": {"none": 1.0, "mask": -4.0}, "kept": {"none": 1.0, "mask": 1.0}}
    assert set(in_nats(means, "own", share=True)[1]["measure"]) == {"share"}
    assert set(in_nats(means, "own")[1]["measure"]) == {"drop"}


def test_a_spared_score_that_nothing_moves_leaves_the_ratio_uncertain():
    masked, _ = in_nats({"swap": {"none": 0.0, "mask": -4.0}, "kept": {"none": 0.0, "mask": 0.0}})
    answers = masked.answers.copy()
    answers.loc[answers["task"] == "kept", "logit_difference"] = 1.0
    tasks = {"targets": ["swap"], "spared": ["kept"], "summary": masked.summary}
    found = selectivity(answers, masked.rows, metric="logit_difference", **tasks)
    assert found["ratio"].tolist() == [0, 0]
    assert set(found["verdict"]) == {"selective, not certain"}


def test_metrics_without_a_meaning_here_or_without_a_summary_are_refused_by_name():
    masked, _ = in_nats({"swap": {"none": 0.0, "mask": -4.0}, "kept": {"none": 0.0, "mask": 0.0}})
    tasks = {"targets": ["swap"], "spared": ["kept"]}
    for metric in ("memory", "memory_ratio"):
        with pytest.raises(MoELensError, match=f"no verdict of selectivity on {metric}: it counts answers from memory"):
            selectivity(masked.answers, masked.rows, metric=metric, summary=masked.summary, **tasks)
    with pytest.raises(MoELensError, match="a verdict on f1 needs the summary of it"):
        selectivity(masked.answers, masked.rows, metric="f1", summary=masked.summary, **tasks)
    with pytest.raises(MoELensError, match="a verdict on logit_difference needs the summary of it"):
        selectivity(masked.answers, masked.rows, metric="logit_difference", **tasks)
    missing = masked.answers.assign(logit_difference=np.nan)
    with pytest.raises(MoELensError, match="no example of swap has a logit_difference"):
        selectivity(missing, masked.rows, metric="logit_difference", summary=masked.summary, **tasks)
