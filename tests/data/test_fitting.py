"""Fitting a length: nothing is longer, an answer that stood in the context still does, and all is counted."""

import os
from pathlib import Path

import pytest
from byte_level_tokenizer import byte_level_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import unigram

from moe_lens.data import Example, encode, fit_length, load_examples
from moe_lens.errors import MoELensError

PLAIN, UNIGRAM = byte_level_tokenizer(chat=False), unigram()
OVERHEAD = len(encode(Example("e", "x", "Which one?", ("x",)), PLAIN).input_ids)
WORDS = "some words and more " * 30 + "then Paris, then " + "other words " * 30
LONG = Example("long", WORDS, "Which one?", ("Paris",))
SHORT = Example("short", "In Paris.", "Which one?", ("Paris",))
ELSEWHERE = Example("elsewhere", "In Bern.", "Which one?", ("Paris",))
CLOSED = Example("closed", "", "Which one?", ("Paris",))


def test_without_a_limit_all_are_kept_and_answers_outside_the_context_counted():
    fitted = fit_length([LONG, SHORT, ELSEWHERE, CLOSED], PLAIN)
    assert fitted.examples == (LONG, SHORT, ELSEWHERE, CLOSED)
    assert (fitted.dropped, fitted.truncated, fitted.without_answer) == ((), (), ("elsewhere",))


def test_longer_ones_are_dropped_or_cut_around_their_answer():
    limit = OVERHEAD + 40
    dropped = fit_length([LONG, SHORT], PLAIN, max_length=limit)
    assert (dropped.examples, dropped.dropped, dropped.truncated) == ((SHORT,), ("long",), ())
    cut = fit_length([LONG, SHORT], PLAIN, max_length=limit, too_long="truncate")
    assert (cut.dropped, cut.truncated, cut.examples[1]) == ((), ("long",), SHORT)
    [shorter, _] = cut.examples
    before, after = shorter.context.split("Paris")
    assert shorter.context in LONG.context
    assert set(shorter.context.replace(",", "").split()) <= set(LONG.context.replace(",", "").split())  # whole words
    assert abs(len(before) - len(after)) <= 30
    assert limit - 15 <= len(encode(shorter, PLAIN).input_ids) <= limit
    assert str(cut) == "0 of 2 examples dropped, 1 truncated; in 0 no answer stands in the context"
    assert str(dropped) == "1 of 2 examples dropped, 0 truncated; in 0 no answer stands in the context"
    assert cut.facts() == {"dropped": 0, "truncated": 1}


def test_a_context_without_its_answer_keeps_its_beginning():
    [cut] = fit_length(
        [Example("e", "First of all " + "word " * 300, "Which one?", ("Paris",))],
        PLAIN,
        max_length=OVERHEAD + 30,
        too_long="truncate",
    ).examples
    assert cut.context.startswith("First of all word")


def test_the_length_of_the_answer_counts_where_training_appends_it():
    length = len(encode(SHORT, PLAIN).input_ids)
    assert fit_length([SHORT, CLOSED], PLAIN, max_length=length).dropped == ()
    assert fit_length([SHORT, CLOSED], PLAIN, max_length=length, with_answer=True).dropped == ("short",)


def test_too_short_a_limit_and_unknown_words_are_refused():
    for how in ("drop", "truncate"):
        with pytest.raises(MoELensError, match="all 2 have more than 3 tokens"):
            fit_length([LONG, CLOSED], PLAIN, max_length=3, too_long=how)
    with pytest.raises(MoELensError, match="must be one of drop, truncate; got 'cut'"):
        fit_length([LONG], PLAIN, too_long="cut")


@pytest.mark.parametrize("tokenizer", [PLAIN, UNIGRAM], ids=["byte-level", "unigram"])
@settings(deadline=None, max_examples=40)
@given(
    before=st.text(st.characters(exclude_categories=["Cs"]), max_size=200),
    after=st.text(st.characters(exclude_categories=["Cs"]), max_size=200),
    room=st.integers(0, 60),
)
def test_whatever_the_text_it_fits_and_keeps_its_answer(tokenizer, before, after, room):
    whole = Example("e", f"{before} Paris {after}", "Which one?", ("Paris",))
    limit = len(encode(Example("e", "Paris", "Which one?", ("Paris",)), tokenizer).input_ids) + 3 + room
    [cut] = fit_length([whole], tokenizer, max_length=limit, too_long="truncate").examples
    encoded = encode(cut, tokenizer)
    assert len(encoded.input_ids) <= limit
    assert encoded.answer_spans
    assert cut.context.strip() in whole.context


def test_real_contexts_fit_the_papers_300_tokens_with_their_answers():
    if "MOE_LENS_SHARED" not in os.environ:
        pytest.skip("MOE_LENS_SHARED is not set")
    rows = load_examples(Path(os.environ["MOE_LENS_SHARED"]) / "data/nq-swap/dev.json", limit=200)
    fitted = fit_length(rows, PLAIN, max_length=300, too_long="truncate")
    assert len(fitted.examples) == 200
    assert len(fitted.truncated) > 150
    assert fitted.without_answer == ()
