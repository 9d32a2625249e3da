"""Selections: the one grammar that names experts, what each form chooses, and what none of them is."""

import re
from dataclasses import replace

import pandas as pd
import pytest

from moe_lens import ExpertSet, MoELensError
from moe_lens.choosing import (
    SCORES,
    Choice,
    Given,
    Ground,
    Planted,
    Random,
    Share,
    Top,
    choices,
    parse,
    planted_experts,
)
from moe_lens.choosing.scores import IN_SHORT
from moe_lens.choosing.selection import parse_one, scores_of

SHARES = {0: [0.4, 0.3, 0.2, 0.1, 0, 0, 0, 0], 1: [0.1] * 4 + [0.15] * 4, 2: [0, 0, 0, 0, 0, 0, 0, 1.0]}
TABLE = pd.DataFrame(
    [(layer, expert, share) for layer, shares in SHARES.items() for expert, share in enumerate(shares)],
    columns=["layer", "expert", "score"],
)


@pytest.fixture
def ground(olmoe) -> Ground:
    """Three layers of eight experts, of which `ce` and `esft-token` are known; nothing is planted."""
    return Ground(olmoe.architecture, "organism", {"ce": TABLE, "esft-token": TABLE.assign(score=1 - TABLE["score"])})


def chosen(text: str, ground: Ground) -> list[Choice]:
    return choices(parse(text), ground)


@pytest.mark.parametrize(
    ("text", "selections"),
    [
        ("ce:4", [Top(SCORES["ce"], 4)]),
        ("oe-mass:1,2,16", [Top(SCORES["oe-mass"], size) for size in (1, 2, 16)]),
        ("reap:2", [Top(SCORES["reap"], 2)]),
        (" ean:2 ", [Top(SCORES["ean"], 2)]),
        ("esft-gate:p=0.2", [Share(SCORES["esft-gate"], 0.2)]),
        ("ce:p=1", [Share(SCORES["ce"], 1.0)]),
        ("ce:p=.5", [Share(SCORES["ce"], 0.5)]),
        ("random:8", [Random(8)]),
        ("random:1,2", [Random(1), Random(2)]),
        (" planted ", [Planted()]),
        ("3:7,5;4:0", [Given(ExpertSet.of({3: [5, 7], 4: [0]}))]),
    ],
)
def test_every_form_is_read_as_what_it_says(text, selections):
    assert list(parse(text)) == selections


def test_every_score_can_be_named_and_tells_which_models_it_asks_for():
    for name, score in SCORES.items():
        assert parse(f"{name}:3") == (Top(score, 3),)
        if score.sums_to_one:
            assert parse_one(f"{name}:p=0.5") == Share(score, 0.5)
        assert scores_of(parse(f"{name}:3")) == [score]
    asked = {name: (score.needs_base, score.needs_tuned) for name, score in SCORES.items()}
    assert [asked[name] for name in ("ce", "oe", "ce-gain", "esft-gate", "reap")] == [
        *((False, True), (True, False), (True, True), (True, False), (True, False))
    ]


def test_a_selection_is_written_as_it_is_read_and_belongs_to_a_family(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"1": [4], "0": []}')
    told = {
        "ce:4": ("ce:4", "ce", 4),
        "esft-token:p=0.20": ("esft-token:p=0.2", "esft-token", None),
        "random:8": ("random:8", "random set", 8),
        "planted": ("planted", "planted", None),
        "4:0;3:7,5": ("3:5,7;4:0", "chosen", None),
        str(file): ("mine", "chosen", None),
    }
    for text, (name, family, size) in told.items():
        selection = parse_one(text)
        assert (selection.name, str(selection), selection.family, selection.size) == (name, name, family, size)
    texts = ["ce:4", "planted", "oe:1,2", "ce:p=0.2", "0:1", "random:2"]
    assert [score.name for score in scores_of(s for text in texts for s in parse(text))] == ["ce", "oe"]


def test_each_form_chooses_its_experts(ground, tmp_path):
    assert chosen("ce:1,2", ground) == [
        Choice("ce:1", "ce", ExpertSet.of({0: [0], 1: [4], 2: [7]})),
        Choice("ce:2", "ce", ExpertSet.of({0: [0, 1], 1: [4, 5], 2: [0, 7]})),
    ]
    assert chosen("esft-token:1", ground)[0].experts == ExpertSet.of({0: [4], 1: [0], 2: [0]})
    [share] = chosen("ce:p=0.5", ground)
    assert share == Choice("ce:p=0.5", "ce", ExpertSet.of({0: [0, 1], 1: [4, 5, 6, 7], 2: [7]}))
    assert share.size == pytest.approx(7 / 3)
    [literal] = chosen("1:5,3;0:2", ground)
    assert (literal.name, literal.family, literal.size) == ("0:2;1:3,5", "chosen", 1.5)
    file = tmp_path / "ce.json"
    file.write_text('{"1": [4]}')
    assert chosen(str(file), ground) == [
        Choice("ce", "chosen", ExpertSet.of({1: [4]}))
    ]  # of no score, for all its name
    planted = planted_experts("organism:planted")
    assert chosen("planted", replace(ground, model="organism:planted")) == [Choice("planted", "planted", planted)]
    with pytest.raises(MoELensError, match="nothing is planted in 'organism'"):
        chosen("planted", ground)


def test_random_experts_are_as_many_in_every_layer_and_depend_on_the_seed_alone(ground):
    [one] = chosen("random:3", ground)
    assert (one.name, one.family, one.size) == ("random set:3", "random set", 3)  # random:3 are the controls
    assert {layer: len(one.experts[layer]) for layer in one.experts.layers} == {0: 3, 1: 3, 2: 3}
    assert chosen("random:3", ground) == [one]
    drawn = {chosen("random:3", replace(ground, seed=seed))[0].experts for seed in range(10)}
    assert len(drawn) == 10
    [within] = chosen("random:3", replace(ground, layers=[1]))
    assert within.experts == one.experts.restrict([1])


def test_what_is_named_twice_is_chosen_once(ground):
    named = [selection for text in ("ce:1", "0:2", "ce:1,2", "0:2;1:3") for selection in parse(text)]
    assert [choice.name for choice in choices(named, ground)] == ["ce:1", "0:2", "ce:2", "0:2;1:3"]
    within = choices(named, replace(ground, layers=[0]))
    assert [choice.name for choice in within] == ["ce:1", "0:2", "ce:2"]  # the last is all the second is, there


def test_within_layers_a_literal_is_called_by_what_is_left_of_it(ground, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"0": [2], "1": [4]}')
    within = {
        layers: [chosen(text, replace(ground, layers=layers))[0] for text in ("0:2;1:3", str(file), "ce:1")]
        for layers in ((0,), (0, 1))
    }
    assert [(c.name, str(c.experts)) for c in within[0,]] == [("0:2", "0:2"), ("mine", "0:2"), ("ce:1", "0:0")]
    assert [c.name for c in within[0, 1]] == ["0:2;1:3", "mine", "ce:1"]
    assert within[0, 1][2].experts == ExpertSet.of({0: [0], 1: [4]})
    with pytest.raises(MoELensError, match="none of the experts of '2:7' is in the layers 0, 1; they are in 2"):
        chosen("2:7", replace(ground, layers=[0, 1]))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ce", "expected ce:N or ce:N,M with whole numbers, such as ce:4, or ce:p=0.2"),
        ("ce:", "with whole numbers"),
        ("ce:x", "with whole numbers"),
        ("ce:1,,2", "with whole numbers"),
        ("ce:-1", "with whole numbers"),
        ("ce:1.5", "with whole numbers"),
        ("ce:0", "takes N from 1, whole; got 'ce:0'"),
        ("ce:4,0", "takes N from 1, whole; got 'ce:0'"),
        ("ce:p=", "or ce:p=0.2 for the highest"),
        ("ce:p=x", "or ce:p=0.2 for the highest"),
        ("ce:p=-1", "or ce:p=0.2 for the highest"),
        ("ce:q=0.2", "or ce:p=0.2 for the highest"),
        ("ce:p=0", "above 0 and at most 1; got 'ce:p=0'"),
        ("ce:p=1.5", "above 0 and at most 1; got 'ce:p=1.5'"),
        ("reap:p=0.2", "reap is no score whose sum over a layer is 1.*take reap:N, or p of a score such as esft-gate"),
        ("ean:p=1", "ean is no score whose sum"),
        ("ce-gain:p=0.2", "ce-gain is no score whose sum"),
        ("random", "random:N,M with whole numbers, such as random:4; got 'random'"),
        ("random:p=0.2", "such as random:4; got"),
        ("random:0", "random:N takes N from 1, whole"),
        ("best:4", "cannot read the experts 'best:4'"),
        ("planted:2", "cannot read the experts"),
        ("", "cannot read the experts ''"),
        ("nowhere.json", "cannot read experts from 'nowhere.json'"),
        ("3:x", "cannot read '3:x'"),
        ("3:", "cannot read"),
        ("empty.json", "'empty' names no experts"),
        ("binary.json", "no UTF-8"),
        ("twice.json", "named once"),
    ],
)
def test_what_names_no_experts_is_refused(text, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.json").write_text('{"3": []}')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    (tmp_path / "twice.json").write_text('{"3": [1], "03": [2]}')
    with pytest.raises(MoELensError, match=says):
        parse(text)


def test_an_unknown_word_is_told_all_that_there_is():
    with pytest.raises(MoELensError) as error:
        parse("cee:4")
    assert ", ".join(SCORES) in str(error.value)
    for form in ("ce:4", "esft-gate:p=0.2", "random:N", "planted", ".json", "3:5,7;4:0"):
        assert form in str(error.value)


def test_one_set_is_one():
    assert parse_one("ce:2") == Top(SCORES["ce"], 2)
    with pytest.raises(MoELensError, match="'ce:1,2' names 2: name one of them"):
        parse_one("ce:1,2")


@pytest.mark.parametrize("text", ["ce:9", "random:9"])
def test_more_experts_than_a_layer_has_are_refused_before_scores_are_measured(text, ground):
    with pytest.raises(MoELensError, match=f"each layer has 8 experts; '{text}' wants 9 of them"):
        parse_one(text).check(ground.architecture)
    for fine in ("random:8", "ce:8", "ce:p=1", "planted", "0:9"):
        parse_one(fine).check(ground.architecture)


@pytest.mark.parametrize("experts", [{0: [1]}, "0:1", None])
def test_what_is_given_in_python_is_a_set_of_experts(experts):
    with pytest.raises(MoELensError, match="expected an ExpertSet"):
        Given(experts)
    with pytest.raises(MoELensError, match="names no experts"):
        Given(ExpertSet())


def test_a_score_that_was_not_measured_is_asked_for_by_name(ground):
    with pytest.raises(MoELensError, match=r"ranked by reap, which was not measured: .* given are ce, esft-token"):
        chosen("reap:1", ground)


@pytest.mark.parametrize("make", [lambda: Random(1.5), lambda: Top(SCORES["ce"], 2.5)])
def test_sizes_are_whole(make):
    with pytest.raises(MoELensError, match="takes N from 1, whole; got"):
        make()


@pytest.mark.parametrize("called", ["none", "planted", "random:2", "ce:4"])
def test_experts_are_not_called_by_what_means_something_else(called):
    with pytest.raises(MoELensError, match=f"cannot be called '{called}'"):
        Given(ExpertSet.of({1: [2]}), called)


def test_a_score_is_shown_in_a_line():
    assert repr(parse_one("ce:4")).startswith("Top(score=Score('ce', 'context-dependence ratio")
    assert "lambda" not in repr(SCORES)


def test_help_names_every_score_in_words_that_its_columns_do_not_cut():
    words = set(re.findall(r"[\w-]+", IN_SHORT.partition(";")[0])) - {
        "each",
        "also",
        "with",
        "after",
        "it",
        "and",
        "then",
    }
    parts = [
        re.fullmatch(r"(.+?)(-integrated)?(-all|-mass|-last|-question|-from_question)?", name).groups("")
        for name in SCORES
    ]
    assert words == {part for name in parts for part in name if part}
    assert {stem for stem, _, _ in parts} <= set(SCORES)
    assert max(map(len, words)) < 20
