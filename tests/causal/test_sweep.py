"""Log-probabilities of answers, and the effect of single experts on them."""

import pytest
import torch
from conftest import build_model

from moe_lens import Example, ExpertSet, MoELens, MoELensError, Zero
from moe_lens.causal.sweep import single_expert_effects
from moe_lens.data import encode

EXAMPLES = [
    Example("a", "The capital of Arland is Belmor.", "What is the capital of Arland?", ("Belmor",)),
    Example("b", "The cat sat on the mat.", "Where did the cat sit?", ("on the mat", "the mat")),
    Example("c", "", "Who slept?", ("the dog",)),
]


def by_hand(lens: MoELens, example: Example) -> float:
    """The sum over the answer's tokens of the bare model's log-probabilities, one prompt at a time."""
    encoded = encode(example, lens.tokenizer, with_answer=True)
    ids = torch.tensor([encoded.input_ids])
    with torch.no_grad():
        log_probabilities = lens.module(ids).logits[0].log_softmax(-1)
    answer = range(encoded.prompt_length, len(encoded.input_ids))
    return sum(float(log_probabilities[i - 1, encoded.input_ids[i]]) for i in answer)


def test_answer_log_probabilities_equal_the_bare_models(lens):
    got = lens.answer_log_probabilities(EXAMPLES, batch_size=2, progress=False)
    assert got == pytest.approx([by_hand(lens, example) for example in EXAMPLES], abs=1e-4)


def test_answer_log_probabilities_refuse_a_bare_text(olmoe):
    with pytest.raises(MoELensError, match="has no answer"):
        olmoe.answer_log_probabilities(["What?"], progress=False)


def test_effect_is_what_the_answers_lose_when_one_expert_is_masked(tokenizer):
    lens = MoELens.from_pretrained(build_model("olmoe", len(tokenizer), num_hidden_layers=1), tokenizer)
    table = single_expert_effects(lens, EXAMPLES, progress=False)
    assert list(table["expert"]) == list(range(lens.architecture.n_experts))
    whole = torch.tensor([by_hand(lens, example) for example in EXAMPLES])
    with lens.intervene(Zero(ExpertSet.of({0: [3]}))):
        masked = torch.tensor(lens.answer_log_probabilities(EXAMPLES, progress=False))
    row = table.set_index("expert").loc[3]
    assert row["effect"] == pytest.approx(float((whole - masked).mean()), abs=1e-4)
    assert row["effect_low"] <= row["effect"] <= row["effect_high"]
    assert table["effect"].abs().max() > 1e-3, "no expert matters: the masks did not take"
    assert row["p_value"] <= row["q_value"] <= 1
    assert row["cohens_d"] == pytest.approx(float((whole - masked).mean() / (whole - masked).std()), rel=1e-3)
