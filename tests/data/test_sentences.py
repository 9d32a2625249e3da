"""Where sentences end: punctuation, abbreviations, scripts without spaces, and nothing lost between them."""

import pytest

from moe_lens.data.sentences import sentences

CASES = {
    "One. Two! Three?": ["One.", "Two!", "Three?"],
    "He said “Go.” Then he went.": ["He said “Go.”", "Then he went."],
    "It fell by 3.5 percent. 1939 was worse.": ["It fell by 3.5 percent.", "1939 was worse."],
    "Dr. J. R. Smith of the U.S. Army met St. Peter. He left.": [
        "Dr. J. R. Smith of the U.S. Army met St. Peter.",
        "He left.",
    ],
    "Some, e.g. Rome, are old. Others are not.": ["Some, e.g. Rome, are old.", "Others are not."],
    "It is big. (It is very big.) yes": ["It is big.", "(It is very big.) yes"],
    "<P> Paris is a city . The Seine runs through it . </P>": [
        "<P> Paris is a city .",
        "The Seine runs through it .",
        "</P>",
    ],
    "巴黎是首都。它在法国。": ["巴黎是首都。", "它在法国。"],
    "彼は「行け。」と言った。終わり。": ["彼は「行け。」", "と言った。", "終わり。"],
    "दिल्ली राजधानी है। वह भारत में है।": ["दिल्ली राजधानी है।", "वह भारत में है।"],
    "A heading\n\nA sentence\nover two lines": ["A heading", "A sentence\nover two lines"],
    "no end": ["no end"],
    "": [],
}


@pytest.mark.parametrize("text", CASES)
def test_sentences_end_where_a_reader_says(text):
    assert [text[part].strip() for part in sentences(text)] == CASES[text]


@pytest.mark.parametrize("text", [*CASES, "  A b. C d.  \n", "...", "A. \n\n B. ", "。。。a"])
def test_sentences_make_up_the_text(text):
    assert "".join(text[part] for part in sentences(text)) == text
    assert all(text[part] for part in sentences(text))
