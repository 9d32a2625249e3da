"""AnswerProbability: its last layer is the model's own, joint is a product, and a hand-made head is read right."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from moe_lens.data import Example, encode
from moe_lens.errors import MoELensError
from moe_lens.lens import Record
from moe_lens.metrics import answer_probability_gain
from moe_lens.statistics import AnswerProbability

EXAMPLES = [
    Example("a", "The capital of Arland is Belmor.", "What is the capital of Arland?", ("Belmor",)),
    Example("b", "The cat sat on the mat.", "Where did the cat sit?", ("on the mat", "the mat")),
    Example("c", "", "Who slept?", ("the dog",)),
]


def test_the_last_layers_lens_is_the_model(lens):
    [found] = lens.measure(EXAMPLES, AnswerProbability(lens.project_on_vocab), batch_size=2, progress=False)
    table = found.table().set_index(["layer", "tokens", "id"])
    last = lens.architecture.n_layers - 1
    for example in EXAMPLES:
        encoded = encode(example, lens.tokenizer, with_answer=True)
        with torch.no_grad():
            probabilities = lens.module(torch.tensor([encoded.input_ids])).logits[0].double().softmax(-1)
        start, stop = encoded.prompt_length, len(encoded.input_ids) - 1  # without end-of-sequence
        each = [float(probabilities[i - 1, encoded.input_ids[i]]) for i in range(start, stop)]
        assert table.loc[(last, "first", example.id), "probability"] == pytest.approx(each[0], rel=1e-3)
        assert table.loc[(last, "joint", example.id), "probability"] == pytest.approx(np.prod(each), rel=1e-3)
    assert len(table) == 2 * len(EXAMPLES) * (last + 1)
    assert np.exp(table["log_probability"]).to_numpy() == pytest.approx(table["probability"].to_numpy())


def test_the_moe_output_is_what_the_block_adds_to_the_stream(lens):
    seen = []
    layers = lens.module.get_submodule(lens.architecture.layers[0].rpartition(".")[0])
    moe = lens.architecture.moe_layers[-1]
    hook = layers[moe].mlp.register_forward_hook(lambda *call: seen.append(call[-1]))
    try:
        [record] = lens.records(EXAMPLES, capture=("moe_output", "routing"), batch_size=3, progress=False)
    finally:
        hook.remove()
    assert tuple(record.moe_output) == lens.architecture.moe_layers
    block = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert torch.equal(record.moe_output[moe][:, 0], block.view(*record.input_ids.shape, -1)[:, -1])
    probability = AnswerProbability(lens.project_on_vocab, stream="moe_output")
    lens.measure(EXAMPLES, probability, batch_size=2, progress=False)
    assert set(probability.table()["layer"]) == set(lens.architecture.moe_layers)


def test_a_hand_case_of_two_layers():
    """Residuals are one-hot and the head doubles logits: the probability of a hit is e² / (e² + 3)."""
    hits = torch.eye(4)[torch.tensor([[0, 2, 1, 3]])]
    given = Record(
        ids=("x",),
        input_ids=torch.tensor([[9, 2, 1, 3]]),
        attention_mask=torch.ones(1, 4, dtype=torch.int64),
        context_spans=(None,),
        question_spans=(None,),
        answer_spans=((),),
        kept=torch.arange(4),
        captured={"residual": {0: hits, 1: torch.roll(hits, -1, 1)}},
        labels=torch.tensor([[-100, 2, 1, 3]]),  # two tokens and end-of-sequence
    )
    table = AnswerProbability(lambda stream: 2 * stream).update(given).table().set_index(["layer", "tokens"])
    hit, miss = np.exp(2) / (np.exp(2) + 3), 1 / (np.exp(2) + 3)
    found = table["probability"].to_dict()
    assert found == pytest.approx({(0, "first"): miss, (0, "joint"): miss**2, (1, "first"): hit, (1, "joint"): hit**2})
    nothing = replace(given, labels=torch.tensor([[-100, -100, -100, 3]]))
    with pytest.raises(MoELensError, match="seen no example"):
        AnswerProbability(lambda stream: stream).update(nothing).table()


def test_batching_changes_nothing_and_a_model_has_no_gain_over_itself(olmoe):
    [whole] = olmoe.measure(EXAMPLES, AnswerProbability(olmoe.project_on_vocab), batch_size=3, progress=False)
    [single] = olmoe.measure(EXAMPLES, AnswerProbability(olmoe.project_on_vocab), batch_size=1, progress=False)
    pd.testing.assert_frame_equal(single.table(), whole.table(), rtol=1e-3)
    gains = answer_probability_gain(whole.table(), whole.table(), resamples=20)
    assert len(gains) == 2 * olmoe.architecture.n_layers
    assert (gains[["gain", "median", "ratio_of_means"]] == 0).all(axis=None)


def test_misuse_is_refused(olmoe):
    with pytest.raises(MoELensError, match="stream must be one of"):
        AnswerProbability(olmoe.project_on_vocab, stream="mlp")
    [without] = olmoe.records(EXAMPLES, capture=("residual",), progress=False)
    with pytest.raises(MoELensError, match="has no answers"):
        AnswerProbability(olmoe.project_on_vocab).update(without)
    [last] = olmoe.records(EXAMPLES, capture=("residual",), with_answer=True, progress=False)
    with pytest.raises(MoELensError, match="did not keep the positions"):
        AnswerProbability(olmoe.project_on_vocab).update(last)
    with pytest.raises(MoELensError, match="text 0 has no answer"):
        olmoe.measure(["a cat"], AnswerProbability(olmoe.project_on_vocab), progress=False)
