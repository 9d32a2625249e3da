"""Tokens, spans and batches: every span holds the text it names, on any text and on real data sets."""

import os
import re
from pathlib import Path

import pytest
import torch
from byte_level_tokenizer import CHAT_TEMPLATE, byte_level_tokenizer, text_of
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import SlowLetters, bpe, merging, nfkc, slow_bytes, unigram
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_lens.data import FIGURE_10, Example, collate, encode, load_examples
from moe_lens.data.offsets import Offsets, tokenise
from moe_lens.errors import MoELensError

PLAIN, CHAT = byte_level_tokenizer(chat=False), byte_level_tokenizer(chat=True)
UNCUT = byte_level_tokenizer(chat=False, trim_offsets=False)
KINDS = {"unigram": unigram(), "bpe": bpe(), "nfkc": nfkc(), "slow bytes": slow_bytes()}
TOKENIZERS = pytest.mark.parametrize("tokenizer", [PLAIN, CHAT, UNCUT], ids=["plain", "chat", "uncut"])
UNTIMED = settings(deadline=None)  # a busy machine is no failure
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
SPEAKING_TEXT = TEXT.map(str.strip).filter(bool)


def example(context: str, *answers: str, question: str = "Which one?") -> Example:
    return Example("e", context, question, answers or ("x",))


def spans_as_text(encoded, tokenizer) -> list[str]:
    return [text_of(tokenizer, encoded.input_ids[span]) for span in encoded.answer_spans]


@TOKENIZERS
@pytest.mark.parametrize(
    ("context", "answers", "expected"),
    [
        ("Paris, (Paris) and Paris.", ("Paris",), 3),
        ("in 1939 there were 9 of 19", ("9",), 1),
        ("New Yorkers left New York's docks", ("New York",), 1),
        ("the café, the naïve café 🜚 end", ("café", "🜚"), 3),
        ("he was born in 1939", ("9",), 0),
        ("Norwegians know it; another", ("no",), 0),
        ("我在北京的家,北京", ("北京",), 2),
        ("2008年在NBA,北京2008", ("NBA", "2008", "008"), 3),
        ("東京タワー เมืองกรุงเทพ", ("タワー", "กรุงเทพ"), 2),
        ("서울에서", ("서울",), 1),
        ("from $3.3 billion to 3.3", ("$3.3 billion", "3.3"), 3),
        ("Ann Lee and Ann", ("Ann", "Ann Lee"), 3),
        ("nothing here", ("Paris",), 0),
        ("a.b aXb", ("a.b",), 1),
        ("it printed <eos>Paris and <pad> Paris", ("Paris",), 2),
    ],
)
def test_every_occurrence_of_every_answer_has_a_span(tokenizer, context, answers, expected):
    encoded = encode(example(context, *answers), tokenizer)
    texts = spans_as_text(encoded, tokenizer)
    assert len(texts) == expected
    assert all(any(answer in text for answer in answers) for text in texts)
    assert all(len(text.strip()) <= max(map(len, answers)) + 1 for text in texts)


@TOKENIZERS
@UNTIMED
@given(before=TEXT, answer=SPEAKING_TEXT, after=TEXT, question=SPEAKING_TEXT)
def test_spans_hold_their_text_whatever_it_is(tokenizer, before, answer, after, question):
    context = f"{before}({answer}){after}"
    encoded = encode(example(context, answer, question=question), tokenizer)
    ids = encoded.input_ids
    assert context.strip() in text_of(tokenizer, ids[encoded.context])
    assert question in text_of(tokenizer, ids[encoded.question])
    assert encoded.answer_spans
    assert all(answer in text for text in spans_as_text(encoded, tokenizer))
    inside = encoded.context
    assert all(inside.start <= span.start < span.stop <= inside.stop for span in encoded.answer_spans)
    assert encoded.context.stop <= encoded.question.stop <= encoded.prompt_length == len(ids)


def test_a_token_that_merges_the_space_before_an_answer_belongs_to_it():
    encoded = encode(example("I saw New York", "New York"), PLAIN)
    assert spans_as_text(encoded, PLAIN) == [" New York"]


def test_closed_book_questions_have_no_context_and_no_answers_in_it():
    encoded = encode(example("", "Which"), PLAIN)
    assert encoded.context is None
    assert encoded.answer_spans == ()
    assert text_of(PLAIN, encoded.input_ids[encoded.question]).strip() == "Which one?"


@TOKENIZERS
def test_the_prompt_starts_with_one_bos_and_decodes_to_its_text(tokenizer):
    encoded = encode(example("Paris", "Paris"), tokenizer)
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1
    assert encoded.input_ids[0] == tokenizer.bos_token_id
    assert text_of(tokenizer, encoded.input_ids).removeprefix("<bos>") == encoded.text.removeprefix("<bos>")


@TOKENIZERS
@UNTIMED
@given(answer=SPEAKING_TEXT)
def test_an_appended_answer_leaves_the_prompt_as_it_is(tokenizer, answer):
    asked = example("In Paris.", answer, "unused")
    bare, answered = encode(asked, tokenizer), encode(asked, tokenizer, with_answer=True)
    assert answered.input_ids[: answered.prompt_length] == bare.input_ids
    assert (answered.context, answered.question, answered.answer_spans) == (
        bare.context,
        bare.question,
        bare.answer_spans,
    )
    *words, end = answered.input_ids[answered.prompt_length :]
    assert text_of(tokenizer, words) == (answer if tokenizer is CHAT else f" {answer}")
    assert end == tokenizer.eos_token_id


def test_an_answer_starts_as_the_chat_template_starts_it():
    spaced = byte_level_tokenizer(chat=True)
    spaced.chat_template = CHAT_TEMPLATE.replace("{{ message.content | trim }}", " {{ message.content }}")
    answered = encode(example("In Paris.", "Paris", "unused"), spaced, with_answer=True)
    *words, end = answered.input_ids[answered.prompt_length :]
    assert text_of(spaced, words) == " Paris"
    assert end == spaced.eos_token_id


@pytest.mark.parametrize("kind", ["byte-level", "merging", *KINDS])
def test_an_answers_tokens_are_those_of_running_text_with_one_space_before_it(kind):
    tokenizer = {"byte-level": PLAIN, "merging": merging(), **KINDS}[kind]
    asked = example("In New York.", "New York")
    bare, answered = encode(asked, tokenizer), encode(asked, tokenizer, with_answer=True)
    assert answered.input_ids[: answered.prompt_length] == bare.input_ids
    *words, end = answered.input_ids[answered.prompt_length :]
    pieces = tokenizer.convert_ids_to_tokens(words)
    assert "".join(pieces).replace("Ġ", " ").replace("▁", " ") == " New York"
    assert end == tokenizer.eos_token_id
    running = tuple(tokenizer(f"{bare.text} New York")["input_ids"])
    joined_or_ended = kind in ("merging", "slow bytes")  # the prompt's last token would be another, or ends the text
    assert (answered.input_ids[:-1] == running) != joined_or_ended


@pytest.mark.parametrize("kind", ["byte-level", "chat", "merging", *KINDS])
@pytest.mark.parametrize("text", [" New York", "\nNew York", "  "], ids=repr)
def test_a_continuations_own_white_space_is_the_only_one_before_it(kind, text):
    tokenizer = {"byte-level": PLAIN, "chat": CHAT, "merging": merging(), **KINDS}[kind]
    asked = example("In New York.", "New York")
    continued = encode(asked, tokenizer, continuation=text)
    *words, end = continued.input_ids[continued.prompt_length :]
    if text == " New York" and kind != "chat":
        assert continued == encode(asked, tokenizer, with_answer=True)
    if kind in ("byte-level", "chat"):
        assert text_of(tokenizer, words) == text
    assert end == tokenizer.eos_token_id


def test_an_empty_continuation_is_the_end_of_sequence_alone():
    for tokenizer in (PLAIN, CHAT, *KINDS.values()):
        asked = example("In New York.", "New York")
        bare, continued = encode(asked, tokenizer), encode(asked, tokenizer, continuation="")
        assert continued.input_ids == (*bare.input_ids, tokenizer.eos_token_id)
        assert continued.prompt_length == bare.prompt_length


def test_an_answer_right_after_a_chat_templates_newline_has_no_space_before_it():
    tokenizer = bpe()
    tokenizer.chat_template = CHAT_TEMPLATE
    answered = encode(example("In Bern.", "Bern"), tokenizer, with_answer=True)
    *words, _ = answered.input_ids[answered.prompt_length :]
    assert "".join(tokenizer.convert_ids_to_tokens(words)) == "Bern"


def test_batches_are_left_padded_and_spans_move_along():
    rows = [example("Paris, Paris", "Paris"), example("", "Bern"), example("Long ago in Bern " * 5, "Bern")]
    encoded = [encode(row, PLAIN) for row in rows]
    batch = collate(encoded, PLAIN.pad_token_id)
    assert batch.input_ids.shape == batch.attention_mask.shape == (3, len(encoded[2].input_ids))
    assert batch.labels is None
    for row, one in enumerate(encoded):
        ids = batch.input_ids[row]
        assert tuple(ids[batch.attention_mask[row] == 1].tolist()) == one.input_ids
        assert ids[batch.attention_mask[row] == 0].eq(PLAIN.pad_token_id).all()
        assert batch.attention_mask[row].diff().ge(0).all()
        assert tuple(ids[batch.question_spans[row]].tolist()) == one.input_ids[one.question]
        moved = [tuple(ids[span].tolist()) for span in batch.answer_spans[row]]
        assert moved == [one.input_ids[span] for span in one.answer_spans]
    context = batch.input_ids[0, batch.context_spans[0]]
    assert tuple(context.tolist()) == encoded[0].input_ids[encoded[0].context]
    assert batch.context_spans[1] is None
    assert [len(spans) for spans in batch.answer_spans] == [2, 0, 5]


def test_labels_are_the_answer_and_end_of_sequence_at_their_own_positions():
    rows = [example("Paris", "Paris"), example("A longer context with Bern", "Bern and Zürich")]
    batch = collate([encode(row, PLAIN, with_answer=True) for row in rows], PLAIN.pad_token_id)
    trained = batch.labels != -100
    assert torch.equal(batch.labels[trained], batch.input_ids[trained])
    assert [text_of(PLAIN, ids[kept]) for ids, kept in zip(batch.input_ids, trained, strict=True)] == [
        " Paris<eos>",
        " Bern and Zürich<eos>",
    ]


def test_batches_of_nothing_or_of_both_kinds_are_refused():
    bare, answered = encode(example("a"), PLAIN), encode(example("a"), PLAIN, with_answer=True)
    for rows in ([], [bare, answered]):
        with pytest.raises(MoELensError, match="all carry their answer or all do not"):
            collate(rows, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("context", "answers", "expected"),
    [
        ("in New York, (Paris) and Paris.", ("Paris", "New York"), ["New York", "Paris", "Paris"]),
        ("🜚北 and 北 🜚", ("🜚", "北"), ["🜚", "北", "北", "🜚"]),
        ("the café, the naïve café", ("café",), ["café", "café"]),
        ("New  York\x00and\nNew York", ("New York", "and"), ["and", "New York"]),
        ('<Table> <Tr> <Td colspan="2"> Paris </Td> </Tr>', ("Paris", "2"), ["2", "Paris"]),
        ("هنا باريس 👩‍🔬 end", ("باريس", "👩‍🔬"), ["باريس", "👩‍🔬"]),
        ("from 1939–1945, 9", ("1945", "9"), ["1945", "9"]),
        ("nothing here", ("Paris",), []),
    ],
)
def test_spans_of_every_kind_of_tokenizer_decode_to_their_answer(kind, context, answers, expected):
    """Exactly, but for the space before it; the last kind is slow and has no offsets."""
    tokenizer = KINDS[kind]
    encoded = encode(example(context, *answers), tokenizer)
    assert [text.removeprefix(" ") for text in spans_as_text(encoded, tokenizer)] == [
        rewritten(kind, text) for text in expected
    ]
    assert rewritten(kind, context) in text_of(tokenizer, encoded.input_ids[encoded.context])
    assert text_of(tokenizer, encoded.input_ids[encoded.question]).strip() == "Which one?"


def rewritten(kind: str, text: str) -> str:
    """What a tokenizer that rewrites characters makes of a text."""
    return KINDS["nfkc"].backend_tokenizer.normalizer.normalize_str(text) if kind == "nfkc" else text


@pytest.mark.parametrize("kind", ["unigram", "bpe", "slow bytes"])
@settings(deadline=None, max_examples=40)
@given(before=TEXT, answer=SPEAKING_TEXT, after=TEXT, question=SPEAKING_TEXT)
def test_spans_of_sentencepiece_like_and_slow_tokenizers_hold_any_text(kind, before, answer, after, question):
    tokenizer, context = KINDS[kind], f"{before}({answer}){after}"
    encoded = encode(example(context, answer, question=question), tokenizer)
    assert context.strip() in text_of(tokenizer, encoded.input_ids[encoded.context])
    assert question in text_of(tokenizer, encoded.input_ids[encoded.question])
    assert encoded.answer_spans
    assert all(answer in text for text in spans_as_text(encoded, tokenizer))


def test_the_bytes_of_unknown_characters_are_told_apart():
    """A unigram tokenizer gives all bytes of a run of unknown characters the same offsets."""
    encoded = encode(example("🜚北 北京", "北"), KINDS["unigram"])
    assert [span.stop - span.start for span in encoded.answer_spans] == [3, 3]
    assert spans_as_text(encoded, KINDS["unigram"]) == ["北", "北"]


def test_what_a_tokenizer_drops_has_no_span_and_a_dropped_question_is_refused():
    dropped = "\x01"
    encoded = encode(example(dropped, dropped), KINDS["nfkc"])
    assert (encoded.context, encoded.answer_spans) == (None, ())
    with pytest.raises(MoELensError, match="no token covers the question of example 'e'"):
        encode(example("a", question=dropped), KINDS["nfkc"])


def test_a_slow_tokenizer_that_loses_text_is_refused_and_one_that_keeps_it_is_exact():
    tokenizer = SlowLetters()
    ids, offsets = tokenise("the cat sat", tokenizer, add_special_tokens=True)
    assert text_of(tokenizer, ids[offsets.tokens(slice(4, 7))]) == "cat"
    with pytest.raises(MoELensError, match="decodes its tokens to the very text they came from"):
        encode(example("a"), tokenizer)  # the prompt has capitals


def test_a_span_is_from_the_first_to_the_last_token_that_covers_a_character():
    """Against the definition, on offsets in no order, with tokens that cover nothing."""
    offsets = [(0, 0), (0, 3), (3, 5), (5, 5), (3, 5), (5, 9), (0, 0)]
    for start in range(9):
        for stop in range(start + 1, 10):
            covering = [t for t, (a, b) in enumerate(offsets) if a < stop and b > start and a < b]
            assert Offsets(offsets).tokens(slice(start, stop)) == slice(covering[0], covering[-1] + 1)
    assert Offsets(offsets).tokens(slice(9, 12)) is None
    assert Offsets([(0, 2), (4, 6)]).tokens(slice(2, 4)) is None


def test_tokenizers_that_cannot_give_spans_are_refused():
    lossy = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    lossy.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(MoELensError, match="keeps all text"):
        encode(example("b"), PreTrainedTokenizerFast(tokenizer_object=lossy))


def test_an_answer_needs_an_end_of_sequence_token():
    endless = byte_level_tokenizer(chat=False)
    endless.eos_token = None
    with pytest.raises(MoELensError, match="set its eos_token"):
        encode(example("a"), endless, with_answer=True)


#: Of each data set every so manieth example, and in how many contexts of these the answer is found.
DATA_SETS = [
    ("nq-swap/dev", 10, 75),
    ("confiqa-mc/dev", 1, 490),
    ("squad/dev", 10, 433),
    pytest.param("nq-swap/dev", 1, 746, marks=pytest.mark.slow),
    pytest.param("nq-swap/train", 1, 3000, marks=pytest.mark.slow),
    pytest.param("squad/dev", 1, 4330, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def real_data() -> Path:
    if "MOE_LENS_SHARED" not in os.environ:
        pytest.skip("MOE_LENS_SHARED is not set")
    return Path(os.environ["MOE_LENS_SHARED"]) / "data"


@pytest.fixture(scope="module")
def real_tokenizer(real_data):
    rows = load_examples(real_data / "nq-swap/dev.json") + load_examples(real_data / "squad/dev.json")
    return byte_level_tokenizer((row.context for row in rows[::10]), chat=True, vocabulary=4000)


def in_number(context: str, start: int, stop: int) -> bool:
    """Whether the number at an end of this range goes on beyond a point or comma, as "9" does in "0.9"."""
    numbers = [match.span() for match in re.finditer(r"\d+(?:[.,]\d+)*", context)]
    return any(a < place < b for a, b in numbers for place in (start, stop))


@pytest.mark.parametrize(("name", "every", "found"), DATA_SETS)
def test_real_answers_are_found_and_their_spans_are_tight(name, every, found, real_data, real_tokenizer):
    with_answer_in_context = 0
    for row in load_examples(real_data / f"{name}.json")[::every]:
        encoded = encode(row, real_tokenizer)
        ids, answer = encoded.input_ids, row.answers[0]
        with_answer_in_context += bool(encoded.answer_spans)
        assert row.context.strip() in text_of(real_tokenizer, ids[encoded.context])
        assert row.question.strip() in text_of(real_tokenizer, ids[encoded.question])
        whole_words = re.finditer(rf"(?!\B\w){re.escape(answer)}(?<!\w\B)", row.context)
        alone = [match for match in whole_words if not in_number(row.context, *match.span())]
        assert len(encoded.answer_spans) == len(alone)
        for span in encoded.answer_spans:
            assert answer in text_of(real_tokenizer, ids[span])
            assert answer not in text_of(real_tokenizer, ids[span.start + 1 : span.stop])
            assert answer not in text_of(real_tokenizer, ids[span.start : span.stop - 1])
    assert with_answer_in_context == found


def test_figure_10_is_the_default_template():
    assert encode(example("Paris"), PLAIN).text == FIGURE_10.render(example("Paris"), PLAIN).text
