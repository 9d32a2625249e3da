"""Prompts without answers: what the model says is the right answer, and what it says nothing to is left out."""

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
