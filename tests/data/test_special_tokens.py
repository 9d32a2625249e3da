"""What tokenizers put around a text: nothing after a prompt, begin-of-sequence once, whatever their settings."""

import pytest
from byte_level_tokenizer import byte_level_tokenizer
from small_tokenizers import SlowLetters, slow_bytes
from tokenizers import processors

from moe_lens.data import FIGURE_10, Example, encode
from moe_lens.data.offsets import token_ids
from moe_lens.lens.batching import encode_prompt

EXAMPLE = Example("e", "The mill is in New York.", "Where is it?", ("New York",))


def around(single):
    """A tokenizer that puts special tokens around every text, `single` being "<bos> $A <eos>" or the like."""
    tokenizer = byte_level_tokenizer(chat=False)
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<bos>", "<eos>", "<pad>")]
    own = processors.TemplateProcessing(single=single, special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), own])
    return tokenizer


@pytest.mark.parametrize("before", [(), ("<bos>",), ("<pad>", "<bos>")])
def test_a_prompt_ends_where_the_answer_starts(before):
    ending, plain = around(" ".join([*before, "$A", "<eos>"])), around(" ".join([*before, "$A"]))
    assert ending("a")["input_ids"][-1] == ending.eos_token_id
    asked = encode(EXAMPLE, ending)
    assert asked == encode(EXAMPLE, plain)
    assert ending.decode(asked.input_ids) == "".join(before) + asked.text
    assert ending.decode(asked.input_ids[asked.context]).strip() == "The mill is in New York."
    assert encode(EXAMPLE, ending, with_answer=True) == encode(EXAMPLE, plain, with_answer=True)
    assert token_ids("New York", ending, add_special_tokens=True) == plain("New York")["input_ids"]


def test_a_slow_tokenizers_prompt_does_not_end_in_end_of_sequence_either():
    tokenizer = slow_bytes()
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    asked = encode(EXAMPLE, tokenizer)
    assert tokenizer.eos_token_id not in asked.input_ids
    assert tokenizer.decode(asked.input_ids) == asked.text


@pytest.mark.parametrize("text", ["<bos>New York", "New York"])
def test_begin_of_sequence_comes_once(text):
    tokenizer = byte_level_tokenizer(chat=False)
    ids = token_ids(text, tokenizer, add_special_tokens=True)
    assert tokenizer.decode(ids) == "<bos>New York"
    assert encode_prompt(0, text, tokenizer, template=FIGURE_10).input_ids == tuple(ids)


def test_a_text_without_tokens_has_what_the_tokenizer_begins_with():
    assert token_ids("", byte_level_tokenizer(chat=False), add_special_tokens=True) == [0]
    assert token_ids("", around("$A <eos>"), add_special_tokens=True) == []


def test_a_tokenizers_own_truncation_padding_and_splitting_change_no_prompt():
    expected = encode(EXAMPLE, byte_level_tokenizer(chat=False))
    tokenizer = byte_level_tokenizer(chat=False)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=200)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = 5
    tokenizer.split_special_tokens = True
    assert encode(EXAMPLE, tokenizer) == expected
    assert token_ids("<bos>a", tokenizer, add_special_tokens=True)[0] == tokenizer.bos_token_id


def test_a_tokenizer_without_special_tokens_asks_as_it_is():
    tokenizer = SlowLetters()
    tokenizer.bos_token = tokenizer.pad_token = tokenizer.eos_token = None
    assert tokenizer.decode(token_ids("a mill", tokenizer, add_special_tokens=True)) == "a mill"
