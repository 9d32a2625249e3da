"""Selectivity: shares of scores that are lost, the ratio of spared to hit, and what each verdict needs."""

import numpy as np
import pandas as pd
import pytest

from moe_lens import ExpertSet, MoELensError
from moe_lens.choosing import Choice, selectivity
from moe_lens.choosing.masking import Masked, joined, masking_rows

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
