"""Context-faithful prompts: what each schema says, where context and question stand in it, and demonstrations."""

from dataclasses import replace

import pytest
from byte_level_tokenizer import byte_level_tokenizer

from moe_lens.data import SCHEMAS, TEMPLATES, Example, demonstrations_named, demonstrations_of, encode, load_examples
from moe_lens.errors import MoELensError

PLAIN, CHAT = byte_level_tokenizer(chat=False), byte_level_tokenizer(chat=True)
MOON = Example("0", 'The "moon" was reached by Paul.\n', "Who landed there? ", ("Paul",), original_answer="Neil")
INSTRUCTION = "Instruction: read the given information and answer the corresponding question.\n\n"
QUOTED = 'Bob said "The moon was reached by Paul."\nQ: Who landed there in Bob\'s opinion?\nA:'
WANTED = {
    "base": 'The "moon" was reached by Paul.\nQ: Who landed there?\nA:',
    "attr": 'The "moon" was reached by Paul.\nQ: Who landed there based on the given text?\nA:',
    "instr": INSTRUCTION + 'The "moon" was reached by Paul.\nQ: Who landed there?\nA:',
    "opin": QUOTED,
    "instr+opin": INSTRUCTION + QUOTED,
}


@pytest.mark.parametrize("name", WANTED)
def test_a_schema_says_what_the_paper_does(name):
    assert set(WANTED) == set(SCHEMAS)
    assert TEMPLATES[name].render(MOON, PLAIN).text == WANTED[name]
    assert SCHEMAS[name].render(replace(MOON, context=""), PLAIN).text == "Q: Who landed there?\nA:"


@pytest.mark.parametrize("name", ["attr", "opin", "instr+opin"])
def test_only_a_question_mark_is_left_out(name):
    """The released code drops the last character, whatever it is."""
    asked = SCHEMAS[name].render(replace(MOON, question="who landed there"), PLAIN).text
    assert asked == WANTED[name].replace("Who", "who")


@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT], ids=["plain", "chat"])
@pytest.mark.parametrize("shown", [0, 2])
@pytest.mark.parametrize("name", WANTED)
def test_context_question_and_answer_are_found_in_every_schema(name, shown, tokenizer):
    """Also where the demonstrations hold the same texts before them."""
    template = replace(SCHEMAS[name], demonstrations=tuple(replace(MOON, id=f"shown {n}") for n in range(shown)))
    found = encode(MOON, tokenizer, template=template, with_answer=True)
    context = MOON.context.strip().replace('"', "" if "opin" in name else '"')

    def text(span: slice) -> str:
        return tokenizer.decode(found.input_ids[span]).strip()

    assert text(found.context) == context
    assert text(found.question).removesuffix("?") == "Who landed there"
    assert [text(span) for span in found.answer_spans] == ["Paul"]
    assert found.context.start > sum(len(tokenizer(context)["input_ids"]) for _ in range(shown))
    assert found.text.count("Who landed there") == shown + 1
    assert found.text.count("\nA: Paul\n\n") == shown


def test_an_example_is_never_shown_its_own_answer():
    other = Example("1", "It is red.", "Which?", ("red",))
    template = replace(SCHEMAS["base"], demonstrations=(MOON, other))
    assert template.render(MOON, PLAIN).text == f"It is red.\nQ: Which?\nA: red\n\n{WANTED['base']}"


def test_without_a_context_the_demonstrations_stay_the_same():
    """So that the twin of context-aware decoding differs by the context alone."""
    template = replace(SCHEMAS["base"], demonstrations=(Example("1", "It is red.", "Which?", ("red",)),))
    given, alone = (template.render(one, PLAIN).text for one in (MOON, replace(MOON, context="")))
    assert given.replace(f"{MOON.context.strip()}\n", "") == alone


def test_facts_tell_schemas_and_demonstrations_apart():
    one, two = (replace(SCHEMAS["opin"], demonstrations=(replace(MOON, answers=(it,)),)) for it in ("Paul", "Ann"))
    told = [template.facts() for template in (*SCHEMAS.values(), one, two)]
    assert len({str(facts) for facts in told}) == len(told)
    assert one.facts()["demonstrations"]["examples"] == 1
    assert "demonstrations" not in SCHEMAS["opin"].facts()


def test_original_demonstrations_say_what_memory_does_and_counterfactual_ones_the_context():
    [train] = load_examples("swap", split="train", limit=1)
    [counter], [original] = (demonstrations_named(f"{kind}:1:swap") for kind in ("counterfactual", "original"))
    assert counter == train
    assert original.answers == (train.original_answer,)
    assert train.original_answer in original.context
    assert train.answers[0] not in original.context
    agreed = Example("1", "It is red.", "Which?", ("red",))
    assert demonstrations_of("original", 1, [agreed]) == (agreed,)


@pytest.mark.parametrize("text", ["", "counterfactual", "counterfactual:2", "counterfactual:0:swap", "wrong:1:swap"])
def test_what_names_no_demonstrations_is_refused(text):
    with pytest.raises(MoELensError, match="such as counterfactual:16:swap"):
        demonstrations_named(text)


def test_too_few_demonstrations_are_refused():
    with pytest.raises(MoELensError, match="only 0 of the examples make counterfactual"):
        demonstrations_named("counterfactual:1:novel")
