"""Exact match and F1: hand cases and the rules of SQuAD's normalisation."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.metrics import METRICS, exact_match, exact_match_unicode, f1, normalize_answer, normalize_unicode
from moe_lens.metrics.matching import contains


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The Mughal\tEmpire! ", "mughal empire"),
        ("a an the", ""),
        ("theatre and anthem", "theatre and anthem"),
        ("U.S.A.'s", "usas"),
        ("$3.3 billion", "33 billion"),
        ("Zürich—São", "zürich—são"),
    ],
)
def test_normalisation(text, expected):
    assert normalize_answer(text) == expected


def test_exact_match_takes_the_best_gold_answer():
    assert exact_match("the New York.", ("Boston", "new york")) == 1.0
    assert exact_match("New York City", ("Boston", "new york")) == 0.0
    assert exact_match("", ("Boston",)) == 0.0


def test_f1_counts_shared_words_with_their_multiplicity():
    assert f1("new york city", ("New York",)) == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert f1("bora", ("Bora Bora",)) == pytest.approx(2 / 3)
    assert f1("bora bora bora", ("Bora",)) == pytest.approx(1 / 2)
    assert f1("york new", ("new york",)) == 1.0
    assert f1("rome", ("paris", "rome italy")) == pytest.approx(2 / 3)
    assert f1("rome", ("paris",)) == 0.0


def test_a_sentence_contains_an_answer_as_whole_words_in_their_order():
    said = "The character is played by an actor, Andrew  Garfield."
    assert contains(said, ("Gwendoline Christie", "Andrew Garfield")) == 1.0
    assert contains(said, ("Garfield Andrew",)) == contains(said, ("act",)) == contains(said, ("Garfield II",)) == 0.0
    assert contains("", ("Rome",)) == contains("Rome", ("the",)) == 0.0
    assert contains("The", ("a",)) == 1.0


def test_answers_of_which_nothing_is_left_match_only_each_other():
    assert f1("The", ("a",)) == exact_match("The", ("a",)) == 1.0
    assert f1("", ("Paris",)) == f1("Paris", ("the",)) == 0.0


@pytest.mark.parametrize(
    ("said", "gold"),
    [
        ("東京。", "東京"),
        ("“Paris”", "Paris"),
        ("Ｐａｒｉｓ", "Paris"),
        ("ｶﾞﾝｼﾞｰ", "ガンジー"),
        ("नई दिल्ली।", "नई दिल्ली"),
        ("باريس؟", "باريس"),
        ("\u200fباريس", "باريس"),
        ("Zu\u0308rich", "Zürich"),
        ("STRASSE", "Straße"),
        ("می\u200cخواهم", "میخواهم"),
    ],
)
def test_equal_answers_of_any_script_match_by_em_unicode_where_squads_does_not(said, gold):
    assert exact_match(said, [gold]) == 0
    assert exact_match_unicode(said, [gold]) == 1
    assert exact_match_unicode(said + "x", [gold]) == 0


@settings(deadline=None)
@given(st.text(max_size=12), st.text("aA ,é'\u0301.Ｔthe“’", max_size=12))
def test_what_squad_calls_equal_is_equal_in_every_script(first, second):
    for text in (first, second):
        assert normalize_unicode(normalize_unicode(text)) == normalize_unicode(text)
        changed = f"The {text.upper() if text.isascii() else text}!"
        if exact_match(changed, [text]):
            assert exact_match_unicode(changed, [text])


def conflict(answer: str, *memory: str) -> Example:
    return Example("1", "c", "q", (answer,), memory[0], original_aliases=memory[1:])


def test_memory_is_any_of_its_names_and_its_ratio_is_of_the_answers_that_are_one_or_the_other():
    example = conflict("Lyon", "Bucharest", "Bukarest")
    said = ("bucharest!", "Bukarest", "Lyon", "Rome")
    assert [METRICS["memory"].score(text, example) for text in said] == [1, 1, 0, 0]
    ratios = [METRICS["memory_ratio"].score(text, example) for text in said]
    assert ratios == pytest.approx([1, 1, 0, float("nan")], nan_ok=True)  # p_o / (p_o + p_s) = 2 / 3


@pytest.mark.parametrize(
    "example", [conflict("The Beatles", "Beatles"), conflict("Rome", "Paris", "rome."), Example("1", "c", "q", ("a",))]
)
def test_an_example_whose_memory_is_its_answer_or_unknown_says_nothing_of_memory(example):
    for name in ("memory", "memory_ratio"):
        assert METRICS[name].score(example.answers[0], example) == pytest.approx(float("nan"), nan_ok=True)


@pytest.mark.parametrize("answers", [(), "Paris"])
def test_gold_answers_must_be_a_sequence_of_texts(answers):
    for metric in (exact_match, exact_match_unicode, f1):
        with pytest.raises(MoELensError, match="gold answers"):
            metric("Paris", answers)
