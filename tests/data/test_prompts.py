"""Prompt templates: the paper's wording, plain text and chat turns, where context and question stand, names, files."""

import json

import pytest
from byte_level_tokenizer import byte_level_tokenizer

from moe_lens.data import FIGURE_10, TEMPLATES, Example, PromptTemplate, template_named
from moe_lens.errors import MoELensError

PLAIN, CHAT = byte_level_tokenizer(chat=False), byte_level_tokenizer(chat=True)
MOON = Example("0", "Paul landed on the moon.\n ", "Who landed? ", ("Paul",))


def test_plain_prompt_is_figure_10_with_an_answer_cue():
    assert FIGURE_10.render(MOON, PLAIN).text == (
        "Based on the context below, output the correct answer for the following question.\n\n"
        "Context: Paul landed on the moon.\n\nQuestion: Who landed?\n\nAnswer:"
    )


def test_without_a_context_the_prompt_does_not_speak_of_one():
    prompt = FIGURE_10.render(Example("0", " \n", "Who landed?", ("Paul",)), PLAIN)
    assert prompt.text == ("Output the correct answer for the following question.\n\nQuestion: Who landed?\n\nAnswer:")
    assert prompt.context is None
    assert prompt.text[prompt.question] == "Who landed?"


def test_chat_prompt_is_one_user_turn_that_awaits_the_answer():
    prompt = FIGURE_10.render(MOON, CHAT)
    assert prompt.text.startswith("<bos><|user|>\nBased on")
    assert prompt.text.endswith("Question: Who landed?<eos>\n<|assistant|>\n")


@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT], ids=["plain", "chat"])
@pytest.mark.parametrize("context", ["{question}", "Context: Question: Who?", "<eos> and {{ bos_token }}"])
def test_ranges_are_right_when_the_context_looks_like_a_template(tokenizer, context):
    prompt = FIGURE_10.render(Example("0", context, "{context}?", ("a",)), tokenizer)
    assert prompt.text[prompt.context] == context
    assert prompt.text[prompt.question] == "{context}?"


def test_a_prompt_is_the_users_whole_turn_and_a_verbatim_text_all_that_is_read():
    asked = Example("0", "", " Say Paul.\n", ("Paul",), asked="prompt")
    assert FIGURE_10.render(asked, PLAIN).text == "Say Paul."
    in_chat = FIGURE_10.render(asked, CHAT)
    assert in_chat.text == "<bos><|user|>\nSay Paul.<eos>\n<|assistant|>\n"
    assert (in_chat.context, in_chat.text[in_chat.question]) == (None, "Say Paul.")
    for tokenizer in (PLAIN, CHAT):
        whole = FIGURE_10.render(Example("0", "", " Q: who?\nA:\n", ("Paul",), asked="verbatim"), tokenizer)
        assert (whole.text, whole.rendered, whole.answer_lead) == (" Q: who?\nA:\n", False, "")
        assert whole.text[whole.question] == whole.text
        assert FIGURE_10.render(Example("0", "", "A:", ("Paul",), asked="verbatim"), tokenizer).answer_lead == " "


OPENING = "{% if add_generation_prompt %}<assistant>{% endif %}"
TURNS = "{% for m in messages %}<{{ m.role }}>"


@pytest.mark.parametrize(
    ("template", "end", "lead"),
    [
        (TURNS + "{{ m.content }}<eos>{% endfor %}" + OPENING, "<assistant>", ""),
        (TURNS + " {{ m.content }}<eos>{% endfor %}" + OPENING, "<assistant>", " "),
        (TURNS + "\n{{ m.content }}<eos>{% endfor %}" + OPENING, "<assistant>", "\n"),
        (TURNS + "{{ 'final:' if m.role == 'assistant' }}{{ m.content }}{% endfor %}" + OPENING, "final:", ""),
        (TURNS + "{{ 'final: ' if m.role == 'assistant' }}{{ m.content }}{% endfor %}" + OPENING, "final:", " "),
    ],
)
def test_an_answer_follows_the_prompt_as_the_chat_template_writes_it(template, end, lead):
    tokenizer = byte_level_tokenizer(chat=True)
    tokenizer.chat_template = template
    prompt = FIGURE_10.render(MOON, tokenizer)
    assert prompt.text.endswith(end)
    assert prompt.answer_lead == lead


def test_an_answer_follows_plain_text_after_a_space():
    assert FIGURE_10.render(MOON, PLAIN).answer_lead == " "


def test_a_chat_template_that_does_not_continue_the_prompt_takes_no_answer():
    tokenizer = byte_level_tokenizer(chat=True)
    tokenizer.chat_template = "{{ messages[0].content }}"
    prompt = FIGURE_10.render(MOON, tokenizer)
    assert prompt.text.endswith("Who landed?")
    with pytest.raises(MoELensError, match="does not continue the prompt"):
        _ = prompt.answer_lead


def test_a_chat_template_that_changes_the_text_is_refused():
    shouting = byte_level_tokenizer(chat=True)
    shouting.chat_template = "{{ messages[0].content | upper }}"
    with pytest.raises(MoELensError, match="chat template changes"):
        FIGURE_10.render(MOON, shouting)


@pytest.mark.parametrize(
    ("with_context", "closed_book"),
    [
        ("{question}{context}", "{question}"),
        ("{context}", "{question}"),
        ("{context}{question}", "{context}"),
    ],
)
def test_templates_without_the_right_places_are_refused(with_context, closed_book):
    with pytest.raises(MoELensError, match="expected"):
        PromptTemplate(with_context, closed_book)


def test_templates_have_names():
    assert template_named("figure-10") is FIGURE_10
    assert {name: template_named(name) for name in TEMPLATES} == TEMPLATES
    assert len(set(TEMPLATES.values())) == len(TEMPLATES) == 9


OWN = PromptTemplate("Text:\n{context}\n\nQ: {question}", "Q: {question}", answer_cue=" A:")


def test_a_template_is_read_from_a_file(tmp_path):
    as_json, as_toml = tmp_path / "own.json", tmp_path / "own.toml"
    as_json.write_text(json.dumps(OWN.facts()), encoding="utf-8")
    lines = [f"{name} = {json.dumps(text)}" for name, text in OWN.facts().items()]
    as_toml.write_text("\n".join(lines), encoding="utf-8")
    assert template_named(str(as_json)) == template_named(as_toml) == OWN


def test_a_template_file_need_not_say_the_answer_cue(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text('with_context = "{context} {question}"\nclosed_book = "{question}"\n', encoding="utf-8")
    assert template_named(file) == PromptTemplate("{context} {question}", "{question}")


def test_an_unknown_name_is_told_the_names_and_the_files():
    with pytest.raises(
        MoELensError, match=r"one of figure-10, plain, bare, .*or a \.json or \.toml file with .*; got 'fig-10'"
    ):
        template_named("fig-10")
    with pytest.raises(MoELensError, match=r"a template is one of figure-10, plain, bare, .*; got 'None'"):
        template_named(None)


TEXTS = '"with_context": "{context} {question}", "closed_book": "{question}"'
WRONG = "expected the texts with_context, closed_book and answer_cue, for thoughts answer_after, and for chats"


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("a.json", None, "cannot read a template from .*a.json: .*No such file"),
        ("a.json", b"{", "cannot read a template from"),
        ("a.json", b'{"closed_book": "B\xe4r"}', "cannot read a template from"),
        ("a.toml", b"closed_book = {question}", "cannot read a template from"),
        ("a.json", b"[]", WRONG),
        ("a.json", b'{"closed_book": "{question}"}', WRONG),
        ("a.json", f"{{{TEXTS}, \"cue\": \" A:\"}}".encode(), WRONG),
        ("a.json", f"{{{TEXTS}, \"answer_cue\": 1}}".encode(), WRONG),
        ("a.json", b'{"with_context": "{context}", "closed_book": "{question}"}', r"expected \{context\} and then"),
        ("a.toml", b'with_context = "{context} {question}"\nclosed_book = "Who?"', r"expected \{question\} and no"),
    ],
    ids=[
        "not there", "not JSON", "not UTF-8", "not TOML", "a list", "a text less", "a text more", "a number",
        "no question", "no question in the closed book",
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_template_file_is_said(tmp_path, file, content, said):
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(MoELensError, match=said):
        template_named(tmp_path / file)
