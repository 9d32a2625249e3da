"""What finding.py and strengthening.py choose on dev, how their tables count, and both run small from end to end."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from moe_lens import ExpertSet
from moe_lens.decoding import CAD
from moe_lens.lens.interventions import AddVector, Bias, LogitBias
from moe_lens.paper.finders import best_of_kinds, kind_of
from moe_lens.paper.result_tables import (
    agreement_table,
    below,
    dose_curves,
    left_table,
    mask_table,
    strengthening_table,
)
from moe_lens.paper.strengthening import Point, pairs, random_like

ROOT = Path(__file__).parents[2]


def cells(table: str) -> dict[str, dict[str, str]]:
    """A Markdown table by its first column and its head."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return {row[0]: dict(zip(lines[0], row, strict=True)) for row in lines[2:]}


def test_a_kind_is_a_score_without_where_it_counts():
    names = ("ce-last", "attribution-integrated-from_question", "contrast-all", "contrast(novel;swap)", "ce-gain-mass")
    assert [kind_of(name) for name in names] == ["ce", "attribution", "contrast", "contrast(novel;swap)", "ce-gain"]


def test_dev_chooses_of_each_kind_what_leaves_least_on_average_over_seeds():
    left = {"ce": (0.5, 0.5), "ce-last": (0.1, 0.6), "ce-gain": (0.9, 0.9), "reap": (1.0, 1.0)}
    rows = [{"finder": name, "seed": seed, "em_dev": em} for name, own in left.items() for seed, em in enumerate(own)]
    assert best_of_kinds(pd.DataFrame(rows)) == ["ce-last", "ce-gain", "reap"]


def test_a_difference_has_to_hold_over_questions_and_over_trainings():
    theirs, own = np.ones((5, 40)), np.ones((5, 40))
    own[:, :20] = 0
    interval, p = below(theirs, own + np.linspace(0, 1e-3, 5)[:, None] * (own == 0))
    assert interval.low > 0
    assert p < 0.001
    own = np.ones((5, 40))
    own[0] = 0  # one training alone: sure over questions, not over trainings
    interval, p = below(theirs, own)
    assert interval.low < 0 < interval.mean == pytest.approx(0.2)
    assert p > 0.3
    own = np.ones((5, 40))
    own[:, 0] = np.linspace(0, 0.01, 5)  # one question alone: sure over trainings, not over questions
    assert below(theirs, own)[1] > 0.3


def answers(scores: dict[str, dict[str, list[float]]], **more: object) -> pd.DataFrame:
    """By task and intervention the EM of every question."""
    rows = [
        {"task": task, "intervention": name, "em": em}
        for task, own in scores.items()
        for name, each in own.items()
        for em in each
    ]
    return pd.DataFrame(rows).assign(**more)


def test_agreement_with_both_truths_is_a_mean_over_seeds_that_stays_in_bounds():
    auc = {"one": [1.0, 1.0, 1.0, 1.0, 0.5], "two": [np.nan] * 5}
    rows = [
        {"finder": name, "seed": seed, "seconds": 10.0 + seed, "auc": own[seed], "em_dev": 0.25}
        for name, own in auc.items()
        for seed in range(5)
    ]
    found = cells(agreement_table(pd.DataFrame(rows)))
    assert found["`one`"] == {"finder": "`one`", "CPU s": "12", "AUC": "0.90 [0.62, 1.00]", "EM left, dev": "0.25"}
    assert found["`two`"]["AUC"] == "–"


def test_sets_are_compared_with_the_random_sets_of_their_mode():
    zero = {"none": [1.0] * 8, "one": [0.0] * 8, "random:4#0": [1.0] * 8, "random:4#1": [1.0] * 6 + [0.0] * 2}
    rerouted = {"none": [1.0] * 8, "one": [1.0] * 4 + [0.0] * 4, "random:4#0": [1.0] * 8, "random:4#1": [0.0] * 8}
    spared = {"closed_book": {"none": [1.0] * 8, "one": [1.0] * 6 + [0.0] * 2}}
    parts = [
        answers({"swap": own} | more, mode=mode, seed=seed)
        for mode, own, more in (("zero", zero, spared), ("reroute", rerouted, {}))
        for seed in range(5)
    ]
    verdicts = pd.DataFrame(
        {"intervention": "one", "task": "swap", "verdict": ["selective"] * 3 + ["as random sets"] * 2}
    )
    dev = pd.DataFrame({"finder": ["one", "other"], "seed": 0, "seconds": [3.0, 9.0], "precision": [0.75, 0.5]})
    found = cells(mask_table(dev, pd.concat(parts), verdicts))
    assert list(found) == ["`none`", "`one`", "random sets"]
    own = found["`one`"]
    assert own["`swap` left, zeroed"].startswith("0.00 [0.00")
    assert (own["CPU s"], own["P@k"], found["`none`"]["CPU s"]) == ("3", "0.75", "–")
    assert own["rerouted"].startswith("0.50")
    assert own["below random sets"].startswith("0.88")
    assert own["`closed_book`"] == "0.75"
    assert own["verdict, of so many routers"] == "selective: 3, as random sets: 2"
    assert found["random sets"]["`swap` left, zeroed"].startswith("0.88")
    assert found["random sets"]["rerouted"].startswith("0.50")
    assert found["random sets"]["`closed_book`"] == "–"
    left = left_table(pd.concat(parts), "organism").set_index("finder")["em"]
    assert left.to_dict() == {"nothing masked": 1.0, "random sets": 0.875, "one": 0.0}


def test_ways_are_compared_with_router_tuning_and_with_random_ones_like_them():
    swap = {"none": [0.0] * 10, "CAD 1": [1.0] * 2 + [0.0] * 8, "vector 2": [1.0] * 8 + [0.0] * 2}
    swap |= {f"random like vector 2#{number}": [0.0] * (9 - number) + [1.0] * (1 + number) for number in range(2)}
    book = {name: [1.0] * 10 for name in ("none", "CAD 1", "vector 2")} | {
        f"random like vector 2#{number}": [0.5] * 10 for number in range(2)
    }
    tuned = [
        answers({"swap": {"none": [1.0] * 10}, "closed_book": {"none": [0.9] * 10}}, seed=seed) for seed in range(5)
    ]
    found = cells(strengthening_table(answers({"swap": swap, "closed_book": book}), pd.concat(tuned)))
    assert list(found) == ["as it is", "CAD 1", "vector 2", "router tuning"]
    assert found["vector 2"]["share of router tuning's `swap`"] == "0.80"
    assert found["vector 2"]["less than router tuning"].startswith("0.20")
    assert found["vector 2"]["random like it, `swap`"] == "0.15"
    assert found["CAD 1"]["random like it, `swap`"] == "–"
    assert found["router tuning"]["`closed_book`"].startswith("0.90")


def test_dose_curves_have_a_row_for_each_way_and_what_was_chosen_in_bold():
    rows = [
        {"set": "bias, a", "intervention": f"bias, a {dose}", "task": task, "em": dose * size, "chosen": dose == 3}
        for dose in (2, 3)
        for task, size in (("swap", 0.1), ("closed_book", 0.3))
    ]
    found = cells(dose_curves(pd.DataFrame(rows)))
    assert found == {
        "bias, a": {"way": "bias, a", "strength: `swap` / `closed_book`": "2: 0.20 / 0.60; **3**: 0.30 / 0.90"}
    }


def test_what_is_random_is_as_large_and_acts_in_the_same_place():
    experts, vector = ExpertSet.of({0: [1, 2], 3: [5]}), torch.tensor([3.0, 4.0, 0.0])
    bias = random_like(Bias(experts, 3.0, positions="from_question"), 1, 16)
    assert isinstance(bias, Bias)
    assert (bias.alpha, bias.positions) == (3.0, "from_question")
    assert bias.experts != experts
    assert {layer: len(ids) for layer, ids in bias.experts.members} == {0: 2, 3: 1}
    added = random_like(AddVector(2, vector, 1.5, positions="last"), 1, 16)
    assert isinstance(added, AddVector)
    assert (added.layer, added.scale, added.positions) == (2, 1.5, "last")
    assert added.vector.norm() == pytest.approx(5.0)
    assert not torch.allclose(added.vector, vector)
    mixed = random_like(LogitBias({1: torch.arange(16.0)}), 1, 16)
    assert isinstance(mixed, LogitBias)
    assert mixed.biases[1].sort().values.equal(torch.arange(16.0))
    assert not mixed.biases[1].equal(torch.arange(16.0))


def test_pairs_are_of_points_that_spare_with_the_best_first():
    experts = ExpertSet.of({0: [1]})
    points = [Point("bias, one", f"{dose:g}", dose, (Bias(experts, dose),)) for dose in (1.0, 2.0, 3.0, 4.0, 5.0)]
    rows = [
        {"intervention": point.name, "role": role, "em": point.distance / 10, "keeps": point.distance < 5}
        for point in points
        for role in ("target", "spared")
    ]
    found = pairs(pd.DataFrame(rows), points)
    assert [point.name for point in found[:2]] == ["bias + cad bias, one 4, 0.5", "bias + cad bias, one 4, 1"]
    assert {point.acts[0].alpha for point in found} == {2.0, 3.0, 4.0}
    assert found[0].decoding == CAD(0.5)
    assert found[0].distance == 4.5


@pytest.mark.slow
@pytest.mark.long
def test_both_studies_run_small_from_end_to_end(tmp_path):
    from test_analyses import read_table, run

    measure = "-m moe_lens.organism.measure --model organism:planted --seeds 0,1 --limit 16 --out tuned"
    run(*measure.split(), folder=tmp_path)
    some = ["ce", "ce-last", "esft-gate", "contrast", "contrast(novel;swap)", "attribution-last"]
    asked = [word for name in some for word in ("--score", name)]
    few = "--routers tuned --out found --scored 12 --dev 4 --test 8 --other 6 --n-random 2 --searches 1"
    finding = (str(ROOT / "analyses" / "finding.py"), *few.split(), *asked)
    printed = run(*finding, folder=tmp_path)
    dev = read_table(tmp_path / "found" / "dev.parquet")
    assert set(dev["finder"]) == {*some, "set", "set;spare, base", "strongest", "planted"}
    assert dev["auc"].dropna().between(0, 1).all()
    masked = read_table(tmp_path / "found" / "answers.parquet")
    assert set(masked["task"]) == {"swap", "novel", "closed_book", "consistent", "hops", "summary"}
    assert "| random sets |" in printed
    assert run(*finding, folder=tmp_path) == printed, "a second run reads what was kept, and says the same"
    few = "--routers tuned --out stronger --train 8 --dev 4 --test 6 --other 4 --n-random 2 --experts planted"
    printed = run(str(ROOT / "analyses" / "strengthening.py"), *few.split(), folder=tmp_path)
    assert "| router tuning |" in printed
    curves = read_table(tmp_path / "stronger" / "dev.parquet")
    assert {"bias, planted", "vector", "CAD", "AdaCAD", "trained bias #0"} <= set(curves["set"])
    assert curves.groupby("set")["chosen"].agg(lambda own: own.sum() in (0, 3)).all()
