"""Which strength is chosen: the best for the targets of those that spare, and nothing where doing nothing is better."""

import numpy as np
import pandas as pd
import pytest

from moe_lens.choosing.doses import Candidate, dose_table, merged
from moe_lens.choosing.masking import mask
from moe_lens.choosing.selection import Choice
from moe_lens.data import Example
from moe_lens.experts import ExpertSet
from moe_lens.lens.interventions import parse_mode


def answers(**scores: dict[str, int]) -> pd.DataFrame:
    """By task: of 100 questions, how many each intervention gets right."""
    return pd.concat(
        pd.DataFrame(
            {
                "task": task, "intervention": name, "id": [str(i) for i in range(100)],
                "em": (np.arange(100) < right).astype(float), "f1": 0.0, "memory": np.nan,
            }
        )
        for task, by_name in scores.items()
        for name, right in by_name.items()
    )  # fmt: skip


def candidates(*strengths: float, of: str = "a", neutral: float = 0.0) -> list[Candidate]:
    return [Candidate(f"{of}@{strength:g}", of, strength, abs(strength - neutral)) for strength in strengths]


def chosen(table: pd.DataFrame) -> list[str]:
    return table.loc[table["chosen"], "intervention"].unique().tolist()


def test_chosen_is_the_highest_target_of_those_whose_every_spared_task_keeps():
    found = answers(
        swap={"none": 10, "a@1": 40, "a@2": 60, "a@3": 90},
        novel={"none": 100, "a@1": 100, "a@2": 95, "a@3": 94},
        closed_book={"none": 80, "a@1": 80, "a@2": 76, "a@3": 80},
    )
    table = dose_table(found, candidates(1, 2, 3), targets=["swap"], spared=["novel", "closed_book"])
    assert chosen(table) == ["a@2"], "0.95 is kept at .95 of 100 and at .76 of .80; 0.94 is not"
    row = table.set_index(["intervention", "task"]).loc[("a@3", "novel")]
    assert (row["role"], row["unmasked"], row["em"], row["kept"], row["keeps"]) == ("spared", 1.0, 0.94, 0.94, False)
    assert row["em_low"] < 0.94 < row["em_high"]
    assert table.loc[table["role"] == "target", "keeps"].isna().all()
    alone = dose_table(found, candidates(1, 2, 3), targets=["swap"], spared=["closed_book"])
    assert chosen(alone) == ["a@3"]


def test_several_targets_count_by_their_mean_and_equals_go_to_the_strength_nearest_to_nothing():
    found = answers(
        swap={"none": 10, "a@0.5": 30, "a@3": 50, "a@2": 50, "a@-2": 50},
        hops={"none": 10, "a@0.5": 90, "a@3": 60, "a@2": 60, "a@-2": 60},
    )
    assert chosen(dose_table(found, candidates(0.5, 3, 2), targets=["swap", "hops"], spared=[])) == ["a@0.5"]
    assert chosen(dose_table(found, candidates(3, 2), targets=["swap", "hops"], spared=[])) == ["a@2"]
    scales = candidates(3, 2, -2, neutral=-3.0)
    assert chosen(dose_table(found, scales, targets=["swap", "hops"], spared=[])) == ["a@-2"]


def test_each_set_has_its_own_strength_and_saved_alternatives_share_one():
    found = answers(
        swap={"none": 10, "a@1": 40, "a@2": 30, "b@1": 50, "b@2": 60, "v/layer-0@1": 20, "v/layer-1@1": 70},
        closed_book=dict.fromkeys(["none", "a@1", "a@2", "b@1", "b@2", "v/layer-0@1", "v/layer-1@1"], 90),
    )
    among = [*candidates(1, 2), *candidates(1, 2, of="b")]
    among += [Candidate(f"v/layer-{layer}@1", "v", 1.0, 1.0) for layer in (0, 1)]
    table = dose_table(found, among, targets=["swap"], spared=["closed_book"])
    assert chosen(table) == ["a@1", "b@2", "v/layer-1@1"]


def test_nothing_is_chosen_where_none_spares_or_none_raises_the_target():
    found = answers(
        swap={"none": 30, "a@1": 40, "a@2": 50, "b@1": 30, "b@2": 20},
        closed_book={"none": 90, "a@1": 85, "a@2": 10, "b@1": 90, "b@2": 90},
        lost={"none": 0, "a@1": 0, "a@2": 0, "b@1": 0, "b@2": 0},
    )
    among = [*candidates(1, 2), *candidates(1, 2, of="b")]
    table = dose_table(found, among, targets=["swap"], spared=["closed_book", "lost"])
    assert chosen(table) == []
    lost = table[table["task"] == "lost"]
    assert lost["kept"].isna().all()
    assert lost["keeps"].all(), "where nothing was right nothing is to be kept"


@pytest.mark.parametrize(("text", "neutral"), [("bias:1,2", 0.0), ("scale:2", 1.0), ("topk:1", 3.0)])
def test_at_the_neutral_strength_nothing_changes(olmoe, text, neutral):
    mode = parse_mode(text)
    assert mode.neutral(olmoe.architecture.top_k) == neutral
    examples = [Example("a", "The cat sat on the mat.", "Who sat?", ("The cat",))]
    plain = olmoe.answer_log_probabilities(examples, progress=False)
    with olmoe.intervene(mode.on(ExpertSet.of({1: [0, 1]}), neutral)):
        assert olmoe.answer_log_probabilities(examples, progress=False) == plain


def test_runs_at_different_strengths_are_one_table_with_the_model_as_it_is_once(olmoe):
    examples = [Example(str(i), "The cat sat on the mat.", f"Who sat {i}?", ("The cat",)) for i in range(3)]
    sets = [Choice(name, name, ExpertSet.of({1: ids})) for name, ids in {"a": [0, 1], "b": [2]}.items()]
    runs = [
        mask(olmoe, examples, [one], f"bias:{dose}", controls=2, max_new_tokens=1)
        for one, dose in zip(sets, (3, 5), strict=True)
    ]
    parts = [type(run)(run.answers.assign(task="t"), run.rows.assign(task="t")) for run in runs]
    found = merged(parts)
    names = ["none", "a@bias=3", "random:2#0@bias=3", "random:2#1@bias=3", "random:2@bias=3", "b@bias=5"]
    assert found.rows["intervention"].tolist()[:6] == names
    assert (found.rows["intervention"] == "none").sum() == 1
    assert len(found.answers) == 3 * 7
    own = found.rows[found.rows["intervention"].isin(["a@bias=3", "b@bias=5"])]
    assert own["q_value"].notna().all()
    assert found.rows.loc[found.rows["family"] == "random", "q_value"].isna().all()
    assert merged(parts[:1]).rows.drop(columns="task").equals(runs[0].rows)


def test_a_run_of_saved_interventions_alone_names_no_sets(olmoe):
    """It is what is left where no strength is chosen, too."""
    examples = [Example("a", "The cat sat on the mat.", "Who sat?", ("The cat",))]
    saved = {"mine": parse_mode("bias:2").on(ExpertSet.of({1: [0]}), 2.0)}
    found = mask(olmoe, examples, [], "zero", saved=saved, controls=2, max_new_tokens=1)
    assert found.rows["intervention"].tolist() == ["none", "mine"]
    assert mask(olmoe, examples, [], "bias:1,2", max_new_tokens=1).rows["intervention"].tolist() == ["none"]
