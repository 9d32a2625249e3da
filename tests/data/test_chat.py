"""Chat templates that think, that want a system turn or arguments, of which there are several, and that fail."""

from dataclasses import replace

import pytest
from byte_level_tokenizer import byte_level_tokenizer

from moe_lens.data import FIGURE_10, Example, PromptTemplate, encode, fit_length, template_named
from moe_lens.data.thoughts import THOUGHTS, without_thoughts
from moe_lens.errors import MoELensError

EXAMPLE = Example("e7", "The mill is in Orn.", "Where is it?", ("Orn",))
TURNS = "{% for m in messages %}[{{ m.role }}]"
OPENING = "{% if add_generation_prompt %}[assistant]{% endif %}"
EMPTY_THOUGHT = (  # Qwen3's way
    TURNS + "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OPENED_BY_THE_PROMPT = (  # DeepSeek-R1's way: the answered chat is written without the thought
    TURNS + "{{ m.content.split('</think>')[-1] }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
)
OPENED_IN_BOTH = (
    TURNS + "{{ '<think>\n' if m.role == 'assistant' }}{{ m.content }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
)
CHANNELS = (  # gpt-oss' way
    TURNS + "{{ '<|channel|>final' if m.role == 'assistant' }}<|message|>{{ m.content }}[end]{% endfor %}" + OPENING
)
PLAIN = TURNS + "{{ m.content }}[end]{% endfor %}" + OPENING


def chatting(template):
    tokenizer = byte_level_tokenizer(chat=True)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (EMPTY_THOUGHT, "[assistant]<think>\n\n</think>\n\n"),
        (OPENED_BY_THE_PROMPT, "[assistant]<think>\n\n</think>\n\n"),
        (OPENED_IN_BOTH, "[assistant]<think>\n\n</think>\n\n"),
        (CHANNELS, "[assistant]<|channel|>final<|message|>"),
        (PLAIN, "[assistant]"),
    ],
    ids=["empty thought", "opened by the prompt", "opened in both", "channels", "none"],
)
def test_what_follows_the_prompt_is_the_answer_and_no_thought(template, end):
    tokenizer = chatting(template)
    asked, answered = encode(EXAMPLE, tokenizer), encode(EXAMPLE, tokenizer, with_answer=True)
    assert asked.text.endswith(f"Where is it?[end]{end}")
    assert answered.input_ids[: answered.prompt_length] == asked.input_ids
    assert tokenizer.decode(asked.input_ids).endswith(end)
    assert tokenizer.decode(answered.input_ids[answered.prompt_length :]) == "Orn<eos>"
    continued = encode(EXAMPLE, tokenizer, continuation=" Bly")
    assert tokenizer.decode(continued.input_ids[continued.prompt_length :]) == " Bly<eos>"


@pytest.mark.parametrize("thinking", [True, False])
def test_an_answer_is_asked_for_alike_whether_the_template_would_think_or_not(thinking):
    template = replace(FIGURE_10, chat_template_kwargs={"enable_thinking": thinking})
    assert encode(EXAMPLE, chatting(EMPTY_THOUGHT), template=template) == encode(EXAMPLE, chatting(EMPTY_THOUGHT))


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("Orn", "Orn"),
        ("<think>\n\n</think>\n\nOrn", "\n\nOrn"),
        ("It says <b>. So: </think>Orn", "Orn"),
        ("<think>a</think>b<think>c</think> Orn", " Orn"),
        ("<think>The mill is in", ""),
        ("Orn<think>or is it", "Orn"),
        *((f"{start} Bly? {close}Orn", "Orn") for start, close in THOUGHTS),
    ],
)
def test_a_text_without_its_thoughts_is_what_follows_the_last(said, answer):
    assert without_thoughts(said) == answer


def test_a_system_prompt_is_a_turn_before_the_question():
    template = replace(FIGURE_10, system_prompt="Based on the context below, be brief.")
    prompt = template.render(EXAMPLE, chatting(PLAIN))
    assert prompt.text.startswith("[system]Based on the context below, be brief.[end][user]Based on")
    assert prompt.text[prompt.context] == "The mill is in Orn."
    assert prompt.text.index("[user]") < prompt.context.start


def test_spans_are_the_users_where_the_system_prompt_says_the_same():
    asked = FIGURE_10.render(EXAMPLE, chatting(PLAIN)).text
    user = asked.removeprefix("[user]").removesuffix("[end][assistant]")
    prompt = replace(FIGURE_10, system_prompt=user).render(EXAMPLE, chatting(PLAIN))
    assert prompt.context.start > prompt.text.index("[user]")


def test_arguments_reach_the_chat_template():
    template = replace(FIGURE_10, chat_template_kwargs={"tone": "dry"})
    assert template.render(EXAMPLE, chatting("{{ tone }}" + PLAIN)).text.startswith("dry[user]")


def test_one_of_several_chat_templates_is_named():
    several = chatting({"rag": "RAG" + PLAIN, "tools": "TOOLS" + PLAIN})
    with pytest.raises(MoELensError, match=r"example 'e7'.*templates for rag, tools: .*chat_template=rag"):
        encode(EXAMPLE, several)
    named = replace(FIGURE_10, chat_template_kwargs={"chat_template": "tools"})
    assert encode(EXAMPLE, several, template=named).text.startswith("TOOLS")
    assert encode(EXAMPLE, chatting({"default": PLAIN, "rag": "RAG" + PLAIN})).text.startswith("[user]")


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('a system turn comes first') }}",
        "{% for m in messages %}{{ m.content }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[0].parts[3] }}",
    ],
    ids=["refuses", "broken", "adds what cannot be added", "wants parts"],
)
def test_a_chat_template_that_fails_is_told_with_the_example(template):
    with pytest.raises(MoELensError, match=r"chat template fails on example 'e7' \(.*--system-prompt"):
        encode(EXAMPLE, chatting(template))
    with pytest.raises(MoELensError, match="example 'e7'"):
        fit_length([EXAMPLE], chatting(template), skip_bad=True)


def test_a_template_that_takes_no_answered_chat_still_asks():
    asks = chatting("{% if messages[-1].role != 'user' %}{{ raise_exception('a question') }}{% endif %}" + PLAIN)
    assert encode(EXAMPLE, asks).text.endswith("[assistant]")
    with pytest.raises(MoELensError, match="does not continue the prompt"):
        encode(EXAMPLE, asks, with_answer=True)


@pytest.mark.parametrize("changes", [{"system_prompt": "Be brief."}, {"chat_template_kwargs": {"a": 1}}])
def test_what_is_for_chats_is_refused_without_a_chat_template(changes):
    with pytest.raises(MoELensError, match="no chat template"):
        encode(EXAMPLE, byte_level_tokenizer(chat=False), template=replace(FIGURE_10, **changes))


def test_how_a_prompt_is_rendered_is_no_argument():
    with pytest.raises(MoELensError, match="leave add_generation_prompt, tokenize out"):
        replace(FIGURE_10, chat_template_kwargs={"tokenize": True, "add_generation_prompt": False})


def test_a_template_file_may_say_what_is_for_chats(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(
        'with_context = "{context} {question}"\nclosed_book = "{question}"\nsystem_prompt = "Be brief."\n'
        "[chat_template_kwargs]\nenable_thinking = false\n"
    )
    own = PromptTemplate("{context} {question}", "{question}", "\n\nAnswer:", "Be brief.", {"enable_thinking": False})
    assert template_named(file) == own
    assert own.facts()["chat_template_kwargs"] == {"enable_thinking": False}


def test_facts_of_a_template_that_says_nothing_of_chats_are_its_texts():
    assert set(FIGURE_10.facts()) == {"with_context", "closed_book", "answer_cue"}


def test_an_argument_that_no_template_reads_is_told(recwarn):
    read = chatting(EMPTY_THOUGHT)
    replace(FIGURE_10, chat_template_kwargs={"enable_thinking": False}).render(EXAMPLE, read)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="never reads enable_thought, .* it reads .*enable_thinking"):
        replace(FIGURE_10, chat_template_kwargs={"enable_thought": False}).render(EXAMPLE, read)


def test_a_date_in_a_template_file_is_refused_by_name(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(
        "with_context = '{context} {question}'\nclosed_book = '{question}'\n[chat_template_kwargs]\nday = 2026-01-01\n"
    )
    with pytest.raises(MoELensError, match=r"got day=.*give it as text"):
        template_named(path)
