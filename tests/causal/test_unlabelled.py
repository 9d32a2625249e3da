"""Prompts without answers: what the model says is the right answer, and what it says nothing to is left out."""

import re
from dataclasses import replace

import pytest
from training_cases import fresh

from moe_lens import ExpertSet, MoELens, MoELensError, Zero
from moe_lens.causal import evaluate, own_answers
from moe_lens.data import TEMPLATES

PROMPTS = ["the cat sat", "a dog slept in the sun", "Answer: the capital"]


@pytest.fixture(scope="module")
def lens(tokenizer) -> MoELens:
    found = fresh(tokenizer)
    lens = MoELens(found.module, found.tokenizer, template=TEMPLATES["bare"])
    lens.progress = False
    return lens


def test_answers_are_those_of_the_bare_prompt_and_a_mask_loses_what_it_changes(lens):
    examples = own_answers(lens, PROMPTS, max_new_tokens=4)
    bare = lens.generate(PROMPTS, max_new_tokens=4)
    assert [one.answers for one in examples] == [(text.strip(),) for text in bare]
    every = ExpertSet.of({layer: range(1, 8) for layer in lens.architecture.moe_layers})
    found = evaluate(lens, examples, {"most": Zero(every)}, metrics=["em"], max_new_tokens=4).answers
    assert (found[found["intervention"] == "none"]["em"] == 1).all()
    masked = found[found["intervention"] == "most"]
    assert [row.em == 1 for row in masked.itertuples()] == [
        row.prediction == text.strip() for row, text in zip(masked.itertuples(), bare, strict=True)
    ]
    assert (masked["em"] < 1).any()


def test_prompts_without_an_answer_are_left_out_and_told(lens):
    with pytest.warns(UserWarning, match="1 of 4 prompts have no answer"):
        kept = own_answers(lens, [*PROMPTS[:2], " ", PROMPTS[2]], max_new_tokens=4)
    assert [one.id for one in kept] == ["0", "1", "3"]
    with pytest.raises(MoELensError, match="says nothing to any of 1"):
        own_answers(lens, [" "])


def test_a_prompt_whose_answer_proper_never_begins_is_left_out_so_that_the_model_as_it_is_has_1(lens):
    said = [one.answers[0] for one in own_answers(lens, PROMPTS, max_new_tokens=4)]
    mark = next(letter for letter in said[0][:-1] if any(letter not in other[:-1] for other in said[1:]))
    marked = MoELens(lens.module, lens.tokenizer, template=replace(lens.template, answer_after=re.escape(mark)))
    marked.progress = False
    with pytest.warns(UserWarning, match="prompts have no answer"):
        kept = own_answers(marked, PROMPTS, max_new_tokens=4)
    assert 0 < len(kept) < len(PROMPTS)
    found = evaluate(marked, kept, metrics=["em"], max_new_tokens=4).answers
    assert (found["em"] == 1).all()
