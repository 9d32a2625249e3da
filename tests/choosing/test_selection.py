"""Specifications of experts: what each names, within which layers, and what none of them is."""

import pandas as pd
import pytest

from moe_lens import ExpertSet, MoELensError
from moe_lens.choosing.scores import SCORES
from moe_lens.choosing.selection import (
    Choice,
    check_experts,
    check_specification,
    choose,
    choose_experts,
    score_of,
    scores_needed,
)

TABLE = pd.DataFrame(
    [(layer, expert, expert * (1 - 2 * layer)) for layer in (0, 1) for expert in range(8)],
    columns=["layer", "expert", "score"],
)


def refuse_planted() -> ExpertSet:
    raise MoELensError("nothing is planted")


def chosen(specification: str, **given) -> list[Choice]:
    return choose(specification, **({"tables": {"ce": TABLE}, "planted": refuse_planted} | given))


def to_train(specification: str, **given) -> ExpertSet:
    rest = {"table": TABLE, "planted": refuse_planted, "moe_layers": (0, 1, 2), "n_experts": 8, "seed": 0}
    return choose_experts(specification, **(rest | given))


def test_specifications_name_sets_of_experts(tmp_path):
    assert [(c.intervention, c.family, str(c.experts)) for c in chosen("ce:1,2")] == [
        ("ce:1", "ce", "0:7;1:0"),
        ("ce:2", "ce", "0:6,7;1:0,1"),
    ]
    [literal] = chosen("1:5,3;0:2")
    assert (literal.intervention, literal.family, literal.size) == ("0:2;1:3,5", "chosen", 1.5)
    file = tmp_path / "ce.json"
    file.write_text('{"1": [4]}')
    assert chosen(str(file)) == [Choice("ce", "chosen", ExpertSet.of({1: [4]}))]  # of no score, whatever its name
    planted = ExpertSet.of({0: [1]})
    assert chosen("planted", planted=lambda: planted) == [Choice("planted", "planted", planted)]
    assert [score.name for score in scores_needed(["ce:4", "planted", "oe:1", "ce:2", "0:1"])] == ["ce", "oe"]
    assert [score_of(text) for text in ("esft-gate:2", "random:2", "0:1")] == [SCORES["esft-gate"], None, None]


def test_within_layers_a_literal_is_called_by_what_is_left_of_it(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"0": [2], "1": [4]}')
    within = {
        layers: [chosen(text, layers=layers)[0] for text in ("0:2;1:3", str(file), "ce:1")] for layers in ((0,), (0, 1))
    }
    assert [(c.intervention, str(c.experts)) for c in within[0,]] == [("0:2", "0:2"), ("mine", "0:2"), ("ce:1", "0:7")]
    assert [c.intervention for c in within[0, 1]] == ["0:2;1:3", "mine", "ce:1"]


@pytest.mark.parametrize(
    ("specification", "says"),
    [
        ("ce", "with whole numbers"),
        ("ce:", "with whole numbers"),
        ("ce:x", "with whole numbers"),
        ("ce:0", "takes N from 1; got 'ce:0'"),
        ("best:4", "cannot read the experts"),
        ("nowhere.json", "cannot read experts from nowhere.json"),
        ("planted", "nothing is planted"),
        ("3:x", "cannot read '3:x'"),
        ("empty.json", "'empty.json' names no experts"),
        ("binary.json", "no UTF-8"),
        ("twice.json", "named once"),
    ],
)
def test_what_names_no_experts_is_refused(specification, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.json").write_text('{"3": []}')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    (tmp_path / "twice.json").write_text('{"3": [1], "03": [2]}')
    with pytest.raises(MoELensError, match=says):
        chosen(specification)


def test_more_experts_than_a_layer_has_are_refused_before_scores_are_counted():
    check_specification("ce:8,1", n_experts=8)
    with pytest.raises(MoELensError, match=r"ce:N takes N from 1 to 8, .* got 'ce:1,9'"):
        check_specification("ce:1,9", n_experts=8)


def test_experts_to_train_stay_within_the_layers_asked_for():
    assert to_train("0:1,5;2:7", layers=(0,)) == ExpertSet.of({0: [1, 5]})
    assert to_train("ce:1", layers=(1,)) == ExpertSet.of({1: [0]})
    planted = ExpertSet.of({0: [1], 1: [2]})
    assert to_train("planted", planted=lambda: planted, layers=(1, 2)) == ExpertSet.of({1: [2]})
    drawn = to_train("random:3", layers=(1, 2), seed=4)
    assert (drawn.layers, {len(drawn[layer]) for layer in drawn.layers}) == ((1, 2), {3})
    assert drawn == to_train("random:3", seed=4).restrict([1, 2]) != to_train("random:3", layers=(1, 2), seed=5)
    with pytest.raises(MoELensError, match="none of the experts of '2:7' is in the layers 0, 1; they are in 2"):
        to_train("2:7", layers=(0, 1))


@pytest.mark.parametrize(
    ("specification", "says"),
    [
        ("random:9", "N of the 8 experts"),
        ("random:0", "N of the 8 experts"),
        ("random:", "N of the 8 experts"),
        ("esft-token:p=", "such as esft-token:p=0.2"),
        ("esft-token:p=1.5", "such as esft-token:p=0.2"),
        ("esft-token:p=-1", "such as esft-token:p=0.2"),
        ("ce", "with whole numbers"),
        ("ce:9", "N from 1 to 8"),
        ("ce:1,2", "as one set; 'ce:1,2' names 2"),
        ("experts", "cannot read the experts"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_counted(specification, says):
    with pytest.raises(MoELensError, match=says):
        check_experts(specification, n_experts=8)
    for fine in ("random:8", "esft-token:p=0.2", "esft-gate:p=1", "ce:8", "planted", "x.json", "0:1"):
        check_experts(fine, n_experts=8)
