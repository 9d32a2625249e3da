"""Attribution: by targets, positions and steps, against interventions; direct logit attribution by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import build_model

from moe_lens import Example, ExpertSet, MoELens, MoELensError, Zero
from moe_lens.causal import Attribution, attribution
from moe_lens.causal.direct import direct_logit_attribution
from moe_lens.choosing.procedures import Attributed
from moe_lens.data import encode
from moe_lens.lens import Scale

EXAMPLES = [
    Example("a", "The capital of Arland is Belmor.", "What is the capital of Arland?", ("Belmor",), "the mat"),
    Example("b", "The cat sat on the mat.", "Where did the cat sit?", ("on the mat", "the mat"), "Arland"),
    Example("c", "The dog slept.", "Who slept?", ("the dog",), "Belmor"),
]


@pytest.fixture(scope="module")
def lens(tokenizer):
    lens = MoELens(build_model("qwen2_moe", len(tokenizer)), tokenizer)
    lens.progress = False
    return lens


def log_probabilities(lens, examples=EXAMPLES) -> np.ndarray:
    return np.array(lens.answer_log_probabilities(examples))


def targets(lens) -> dict[str, np.ndarray]:
    """What each target is, example by example."""
    memory = log_probabilities(lens, [replace(one, answers=(one.original_answer,)) for one in EXAMPLES])
    return {"answer": log_probabilities(lens), "difference": log_probabilities(lens) - memory}


def derivative(lens, target, experts, positions) -> float:
    ends = []
    for by in (1e-2, -1e-2):
        with lens.intervene(Scale(experts, 1 + by, positions=positions)):
            ends.append(targets(lens)[target].mean())
    return (ends[0] - ends[1]) / 2e-2


@pytest.mark.parametrize(("batch_size", "at_once"), [(8, 2), (1, 1)])
def test_passes_back_take_a_quarter_of_a_batch(lens, monkeypatch, batch_size, at_once):
    asked, gradients = [], MoELens.gradients

    def seen(self, *args, **told):
        asked.append(told["batch_size"])
        return gradients(self, *args, **told)

    monkeypatch.setattr(MoELens, "gradients", seen)
    attribution(lens, EXAMPLES, Attribution(target="answer"), batch_size=batch_size)
    assert set(asked) == {at_once}


@pytest.mark.parametrize(("target", "positions"), [
    ("difference", "all"), ("answer", "from_question"), ("difference", "last"), ("answer", (0, 1)),
])  # fmt: skip
def test_it_is_the_mean_derivative_of_the_target_where_the_positions_are(lens, target, positions):
    [table] = attribution(lens, EXAMPLES, Attribution(positions=positions, target=target))
    layer = lens.architecture.moe_layers[-1]
    own = table[table["layer"] == layer].set_index("expert")
    expert = own["score"].abs().idxmax()
    measured = derivative(lens, target, ExpertSet.of({layer: [expert]}), positions)
    assert own["score"][expert] == pytest.approx(measured, rel=1e-2, abs=1e-3)
    assert (own["score_low"] <= own["score"]).all()
    assert (own["score"] <= own["score_high"]).all()


def test_integrated_over_all_strengths_the_effects_of_all_experts_sum_to_what_all_of_them_do(lens):
    [table] = attribution(lens, EXAMPLES, Attribution(steps=8))
    every = ExpertSet.of({layer: range(lens.architecture.n_experts) for layer in lens.architecture.moe_layers})
    whole = targets(lens)["difference"].mean()
    with lens.intervene(Zero(every)):
        none = targets(lens)["difference"].mean()
    assert table["score"].sum() == pytest.approx(whole - none, rel=0.1)
    [plain] = attribution(lens, EXAMPLES, Attribution())
    assert abs(plain["score"].sum() - (whole - none)) > abs(table["score"].sum() - (whole - none))


def test_ways_that_share_a_target_share_its_passes_and_change_nothing_for_each_other(lens, monkeypatch):
    passes, own = [], MoELens.gradients

    def counted(self, *arguments, **named):
        passes.append(named["scale"])
        return own(self, *arguments, **named)

    monkeypatch.setattr(MoELens, "gradients", counted)
    ways = [
        Attribution(effect, positions, "answer")
        for effect in ("gate", "logit", "output")
        for positions in ("all", "last")
    ]
    together = attribution(lens, EXAMPLES, *ways, Attribution(), Attribution(target="answer", steps=2))
    assert sorted(passes) == [0.25, 0.75, 1.0, 1.0, 1.0]  # answer in two steps; answer; both sides of the difference
    for way, table in zip(ways, together, strict=False):
        [alone] = attribution(lens, EXAMPLES, way)
        assert table["score"].to_numpy() == pytest.approx(alone["score"].to_numpy(), abs=1e-6)


def test_a_target_of_ones_own_is_of_the_logits_after_bare_texts(lens):
    texts = ["The cat sat on", "The capital of Arland"]

    def margin(logits, examples):
        assert set(examples) == set(texts)
        return logits[:, 5].float() - logits[:, 9].float()

    [table] = attribution(lens, texts, Attribution(target=margin))
    layer = lens.architecture.moe_layers[-1]
    own = table[table["layer"] == layer].set_index("expert")["score"]
    expert = own.abs().idxmax()
    ends = []
    for by in (1e-2, -1e-2):
        with lens.intervene(Scale(ExpertSet.of({layer: [expert]}), 1 + by)):
            logits = [lens.run_with_cache(text)[0][0, -1] for text in texts]
        ends.append(float(np.mean([float(one[5] - one[9]) for one in logits])))
    assert own[expert] == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=1e-2, abs=1e-3)


def test_the_logit_difference_is_of_first_tokens_and_0_where_they_are_one(lens):
    same = replace(EXAMPLES[0], id="same", original_answer="Belmor City")
    one, both = (attribution(lens, found, Attribution(target="logit_difference"))[0]["score"].to_numpy()
                 for found in ([EXAMPLES[0]], [EXAMPLES[0], same]))  # fmt: skip
    assert both == pytest.approx(one / 2, abs=1e-6)
    assert np.abs(one).max() > 1e-3
    with pytest.raises(MoELensError, match="begins with the same token in all examples"):
        attribution(lens, [same], Attribution(target="logit_difference"))


@pytest.mark.parametrize(("examples", "way", "says"), [
    (["a text"], Attribution(), "text 0 has no answer, which the target is of"),
    ([EXAMPLES[0], replace(EXAMPLES[1], original_answer=None)], Attribution(), "'b' has no original_answer"),
    ([replace(EXAMPLES[1], original_answer="on the mat")], Attribution(), "'b' has no original_answer"),
    ([replace(EXAMPLES[2], context="")], Attribution(positions="context"), "'c' has no position 'context' to count"),
    ([], Attribution(), "expected examples and one way"),
])  # fmt: skip
def test_what_the_data_lack_is_refused_by_name(lens, examples, way, says):
    with pytest.raises(MoELensError, match=says):
        attribution(lens, examples, way)


def test_a_target_that_is_not_finite_is_refused_as_the_targets_fault(lens):
    with pytest.raises(MoELensError, match="the target is not finite of example 'a', though the model's logits are"):
        attribution(lens, EXAMPLES[:1], Attribution(target=lambda logits, examples: logits[:, 0] * torch.inf))


def test_two_functions_of_one_name_are_two_targets():
    first, second = (Attributed(Attribution(target=own)) for own in (lambda at, _: at[:, 0], lambda at, _: -at[:, 1]))
    assert first.settings != second.settings


@pytest.mark.parametrize(("wrong", "says"), [
    ({"target": "truth"}, "one of difference, answer, logit_difference"), ({"steps": 0}, "at least 1"),
    ({"positions": "here"}, "positions must be one of"),
])  # fmt: skip
def test_what_is_no_way_to_attribute_is_refused(wrong, says):
    with pytest.raises(MoELensError, match=says):
        Attribution(**wrong)


def test_direct_logit_attribution_refuses_ids_that_repeat(lens):
    """Each row takes the tokens of its own answers; by one id it would get another's."""
    with pytest.raises(MoELensError, match="ids here, which repeat"):
        direct_logit_attribution(lens, [EXAMPLES[0], replace(EXAMPLES[1], id=EXAMPLES[0].id)])


def test_direct_logit_attribution_is_what_the_last_layers_experts_change_when_their_outputs_are_left_out(lens):
    """Nothing comes after the last layer, so to first order its direct effect is its whole effect."""
    table = direct_logit_attribution(lens, EXAMPLES)
    layer = lens.architecture.moe_layers[-1]
    own = table[table["layer"] == layer].set_index("expert")["score"]
    expert = own.abs().idxmax()
    ids = []
    for one in EXAMPLES:
        both = [encode(one, lens.tokenizer, continuation=text) for text in (one.answers[0], one.original_answer)]
        ids.append([each.input_ids[each.prompt_length] for each in both])

    def difference() -> float:
        records = {name: row for record in lens.records(EXAMPLES, capture=["logits"])
                   for name, row in zip(record.ids, record.logits, strict=True)}  # fmt: skip
        logits = torch.stack([records[one.id][-1] for one in EXAMPLES]).float()
        return float((logits.gather(1, torch.tensor(ids)) @ torch.tensor([1.0, -1.0])).mean())

    ends = []
    for by in (1e-2, -1e-2):
        with lens.intervene(Scale(ExpertSet.of({layer: [expert]}), 1 + by, positions="last")):
            ends.append(difference())
    assert own[expert] == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=1e-2, abs=1e-3)
    [whole] = attribution(lens, EXAMPLES, Attribution(positions="last", target="logit_difference"))
    last = table["layer"] == layer
    assert table[last]["score"].to_numpy() == pytest.approx(whole[last]["score"].to_numpy(), abs=1e-4)
    assert table[~last]["score"].to_numpy() != pytest.approx(whole[~last]["score"].to_numpy(), abs=1e-2)
