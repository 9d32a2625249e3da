"""Log-probabilities of answers, and the effect of single experts on them."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import build_model

from moe_lens import Example, ExpertSet, MoELens, MoELensError, Zero
from moe_lens.causal import evaluate
from moe_lens.causal.sweep import single_expert_effects
from moe_lens.data import encode
from moe_lens.lens import Bias, Intervention, Renormalize, Reroute, Rows, Scale
from moe_lens.lens.interventions import Mode

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


@pytest.fixture(scope="module")
def small(tokenizer):
    """Two layers of four experts, so that a whole run for each expert is cheap."""
    module = build_model("olmoe", len(tokenizer), num_hidden_layers=2, num_experts=4, num_experts_per_tok=2)
    return MoELens(module, tokenizer, batch_size=2, progress=False)


CHOICES = [
    replace(example, options=(*example.answers, "the sun"), original_answer=memory)
    for example, memory in zip(EXAMPLES, ("Rome", "in the sun", None), strict=True)
]


def length(prediction: str, example: Example) -> float:
    return float(len(prediction))


def by_evaluate(lens: MoELens, change, metric) -> list[float]:
    """The effects by one whole run for each expert."""
    masks = {f"{layer}:{e}": change(ExpertSet.of({layer: [e]})) for layer in range(2) for e in range(4)}
    table = evaluate(lens, CHOICES, masks, metrics=[metric], max_new_tokens=3).summary.set_index("intervention")
    return table.loc[list(masks), "drop"].tolist()


@pytest.mark.parametrize(
    "metric",
    ["answer_log_probability", "logit_difference", "accuracy", pytest.param(length, id="length")],
)
def test_effects_of_any_metric_are_the_drops_that_evaluation_finds(small, metric):
    found = single_expert_effects(small, CHOICES, metric=metric, max_new_tokens=3)
    assert found["effect"].tolist() == pytest.approx(by_evaluate(small, Zero, metric), abs=1e-4)


@pytest.mark.parametrize(
    ("mode", "change"),
    [
        ("reroute", Reroute),
        ("renormalize", Renormalize),
        ("scale:2.5", lambda experts: Scale(experts, 2.5)),
        (Mode("bias", (2.0,), positions="last"), lambda experts: Bias(experts, 2.0, positions="last")),
        (lambda experts: Scale(experts, -1.0), lambda experts: Scale(experts, -1.0)),
    ],
    ids=["reroute", "renormalize", "scale", "bias", "function"],
)
def test_effects_of_any_mode_are_the_drops_that_evaluation_finds(small, mode, change):
    found = single_expert_effects(small, CHOICES, mode=mode, metric="answer_log_probability")
    expected = by_evaluate(small, change, "answer_log_probability")
    assert found["effect"].tolist() == pytest.approx(expected, abs=1e-4)
    assert max(map(abs, expected)) > 1e-2, "no expert matters"


def never(prediction: str, example: Example) -> float:
    return 0.0


@pytest.mark.parametrize("metric", ["em", pytest.param(never, id="never")])
def test_effects_on_scores_with_bounds_have_the_intervals_of_evaluation(small, metric):
    found = single_expert_effects(small, EXAMPLES, metric=metric, only=[(0, 1)], max_new_tokens=3)
    masks = {"0:1": Zero(ExpertSet.of({0: [1]}))}
    table = evaluate(small, EXAMPLES, masks, metrics=[metric], max_new_tokens=3).summary.set_index("intervention")
    expected = table.loc["0:1", ["drop_low", "drop_high"]].tolist()
    assert found.loc[0, ["effect_low", "effect_high"]].tolist() == pytest.approx(expected, abs=0.05)  # fewer resamples
    assert -1 < found.loc[0, "effect_low"] < found.loc[0, "effect"] == 0 < found.loc[0, "effect_high"] < 1


def test_examples_without_the_metric_are_left_out(small):
    both = single_expert_effects(small, CHOICES, metric="logit_difference")
    without = single_expert_effects(small, CHOICES[:2], metric="logit_difference")
    pd.testing.assert_frame_equal(both, without, atol=1e-5, rtol=1e-3)


def test_effects_are_of_what_is_in_force(small):
    with small.intervene(Reroute(ExpertSet.of({0: [1]}))):
        found = single_expert_effects(small, EXAMPLES).set_index(["layer", "expert"])["effect"]
        before = torch.tensor(small.answer_log_probabilities(EXAMPLES))
        with small.intervene(Zero(ExpertSet.of({1: [2]}))):
            after = torch.tensor(small.answer_log_probabilities(EXAMPLES))
    assert found[1, 2] == pytest.approx(float((before - after).mean()), abs=1e-4)
    assert found[0, 1] == pytest.approx(0, abs=1e-6), "it is selected nowhere"


def test_a_sweep_goes_on_where_an_interrupted_one_stopped(small, tmp_path, monkeypatch):
    expected = single_expert_effects(small, EXAMPLES)
    run, calls = small.answer_log_probabilities_under, []

    def until(stop: int):
        def counted(*arguments, **named):
            calls.append(1)
            if len(calls) == stop:
                raise KeyboardInterrupt
            return run(*arguments, **named)

        return counted

    monkeypatch.setattr(small, "answer_log_probabilities_under", until(2))
    with pytest.raises(KeyboardInterrupt):
        single_expert_effects(small, EXAMPLES, out=tmp_path)
    pd.testing.assert_frame_equal(single_expert_effects(small, EXAMPLES, out=tmp_path), expected)
    assert len(calls) == 3, "two parts, of which the first was there"
    pd.testing.assert_frame_equal(single_expert_effects(small, EXAMPLES, out=tmp_path), expected)
    assert len(calls) == 3
    other = single_expert_effects(small, EXAMPLES, mode="renormalize", out=tmp_path)
    assert len(calls) == 5, "parts of another mode are no parts of this one"
    assert not other["effect"].equals(expected["effect"])


@pytest.mark.parametrize("metric", ["accuracy", "logit_difference"])
def test_what_was_read_of_given_answers_is_the_same_from_a_kept_part(small, tmp_path, metric):
    first = single_expert_effects(small, CHOICES, metric=metric, out=tmp_path)
    pd.testing.assert_frame_equal(single_expert_effects(small, CHOICES, metric=metric, out=tmp_path), first)


def test_another_metric_of_the_same_name_does_not_get_what_was_kept_for_the_first(small, tmp_path):
    def score(prediction: str, example: Example) -> float:
        return length(prediction, example)

    first = single_expert_effects(small, EXAMPLES[:1], metric=score, max_new_tokens=3, out=tmp_path)

    def score(prediction: str, example: Example) -> float:
        return -length(prediction, example)

    second = single_expert_effects(small, EXAMPLES[:1], metric=score, max_new_tokens=3, out=tmp_path)
    assert first["effect"].any()
    assert second["effect"].tolist() == (-first["effect"]).tolist()


SHARED = """
import sys
from conftest import build_model
from test_sweep import EXAMPLES
from transformers import AutoTokenizer
from accelerate import PartialState
from moe_lens import MoELens
from moe_lens.causal import single_expert_effects
PartialState(cpu=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
lens = MoELens(build_model("olmoe", len(tokenizer), num_hidden_layers=2), tokenizer, batch_size=1)
found = single_expert_effects(lens, EXAMPLES)
found.to_parquet(f"{sys.argv[1]}/{PartialState().process_index}.parquet")
"""


@pytest.mark.slow
def test_two_processes_share_a_sweep_and_each_gets_the_table_of_one(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "shared.py").write_text(SHARED)
    tests = Path(__file__).parents[1]
    path = ":".join(map(str, (tests, tests / "causal", tests / "choosing", tests.parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", tmp_path / "shared.py", tmp_path]
    done = subprocess.run(
        [*map(str, command)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lens = MoELens(build_model("olmoe", len(tokenizer), num_hidden_layers=2), tokenizer, batch_size=1, progress=False)
    alone = single_expert_effects(lens, EXAMPLES)
    for process in (0, 1):
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / f"{process}.parquet"), alone)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"mode": "bias:1,2"}, "one expert at a time, at one strength"),
        ({"mode": "topk:2"}, "one expert at a time, at one strength"),
        ({"mode": "delete"}, "the mode of masking must be one of"),
        ({"metric": "accuracy"}, "accuracy needs multiple-choice examples"),
        ({"metric": "logit_difference"}, "logit_difference needs examples with an original_answer"),
        ({"metric": "acc_llm"}, "acc_llm needs a judge"),
        ({"metric": "memory_ratio"}, "memory_ratio is of other examples under each mask"),
        ({"metric": "best"}, "metrics must be of em"),
    ],
    ids=str,
)
def test_what_cannot_be_swept_is_refused(small, wrong, says):
    with pytest.raises(MoELensError, match=says):
        single_expert_effects(small, EXAMPLES, **wrong)


def test_rows_in_force_are_refused(small):
    rows: tuple[Intervention | None, ...] = (Zero(ExpertSet.of({0: [1]})), None, None)
    with small.intervene(Rows(rows)), pytest.raises(MoELensError, match="in an order of its own"):
        single_expert_effects(small, EXAMPLES)
