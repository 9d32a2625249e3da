"""Modes: the word of a command says what is done, how strongly and where, or an error says how it is written."""

import pytest

from moe_lens import ExpertSet, MoELensError, Zero
from moe_lens.lens.interventions import Bias, Force, Mode, Scale, TopK, parse_mode

SOME = ExpertSet.of({0: [1], 2: [3]})


def test_a_word_is_one_intervention_for_each_strength_at_its_place():
    place = {"positions": "from_question", "steps": "prefill"}
    found = {
        word: parse_mode(word, layers=(1,), **place) for word in ("zero", "force", "bias:-1,2.5", "scale:0", "topk:2")
    }
    done = {word: [mode.on(SOME, dose) for dose in mode.doses] for word, mode in found.items()}
    assert done == {
        "zero": [Zero(SOME, **place)],
        "force": [Force(SOME, **place)],
        "bias:-1,2.5": [Bias(SOME, -1.0, **place), Bias(SOME, 2.5, **place)],
        "scale:0": [Scale(SOME, 0.0, **place)],
        "topk:2": [TopK(2, layers=(1,), **place)],
    }
    assert [str(mode) for mode in found.values()] == list(found)
    assert [mode.needs_experts for mode in found.values()] == [True, True, True, True, False]


def test_strengths_that_differ_have_names_that_differ():
    mode = parse_mode("bias:0.1,0.1000001")
    assert [mode.label("ce:4", dose) for dose in mode.doses] == ["ce:4@bias=0.1", "ce:4@bias=0.1000001"]
    assert parse_mode("zero").label("ce:4", None) == "ce:4"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("delete", "must be one of zero, renormalize, reroute, force, or with strengths, such as bias:1,2,5"),
        ("bias", "bias needs strengths, each added to the router logits of the experts.*write bias:1,2,5"),
        ("bias:", "write bias:1,2,5"),
        ("bias:1,,2", "write bias:1,2,5"),
        ("bias:inf", "finite numbers"),
        ("scale:1,1.0", "each strength is run once"),
        ("topk:0", "whole numbers from 1"),
        ("topk:1.5", "whole numbers from 1"),
        ("zero:1", "zero has no strengths; write zero alone"),
    ],
)
def test_a_word_that_cannot_be_read_is_refused_with_how_to_write_it(word, says):
    with pytest.raises(MoELensError, match=says):
        parse_mode(word)


def test_a_place_that_is_nowhere_is_refused_with_the_word():
    with pytest.raises(MoELensError, match="never meet"):
        Mode("zero", positions="last", steps="decode")
