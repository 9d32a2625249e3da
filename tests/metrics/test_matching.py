"""Exact match and F1: hand cases and the rules of SQuAD's normalisation."""

import pytest

from moe_lens.errors import MoELensError
from moe_lens.metrics import exact_match, f1, normalize_answer


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


def test_answers_of_which_nothing_is_left_match_only_each_other():
    assert f1("The", ("a",)) == exact_match("The", ("a",)) == 1.0
    assert f1("", ("Paris",)) == f1("Paris", ("the",)) == 0.0


@pytest.mark.parametrize("answers", [(), "Paris"])
def test_gold_answers_must_be_a_sequence_of_texts(answers):
    for metric in (exact_match, f1):
        with pytest.raises(MoELensError, match="gold answers"):
            metric("Paris", answers)
