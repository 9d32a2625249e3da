"""Patching maps: exactly nothing for own values, the source's score for all of it, and plain hooks in between."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from moe_lens import MoELens
from moe_lens.causal import evaluate, patching_map
from moe_lens.data import Example, encode
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens import Patch, Run, Zero

CLEAN = [
    Example("0", "The cat sat on the mat.", "What sat on the mat?", ("dog",), original_answer="sun"),
    Example("1", "The dog slept in the sun.", "Who slept?", ("cat",), original_answer="mat"),
    Example("2", "Belmor is the capital of Arland.", "What is it?", ("Belmor",), original_answer="Arland"),
]
CORRUPTED = [replace(example, context=example.context[::-1]) for example in CLEAN]
QUIET = {"progress": False}


@pytest.fixture
def pairs(olmoe):
    """Examples and their other halves, of equally many tokens."""
    lengths = [[len(encode(one, olmoe.tokenizer).input_ids) for one in half] for half in (CLEAN, CORRUPTED)]
    longer = [max(0, a - b) for a, b in zip(*lengths, strict=True)]
    shorter = [max(0, b - a) for a, b in zip(*lengths, strict=True)]
    padded = [
        [replace(one, context=f"{one.context}{'~' * more}") for one, more in zip(half, many, strict=True)]
        for half, many in ((CLEAN, shorter), (CORRUPTED, longer))
    ]
    lengths = [[len(encode(one, olmoe.tokenizer).input_ids) for one in half] for half in padded]
    assert lengths[0] == lengths[1]
    return padded


@pytest.mark.parametrize("over", ["positions", "tokens", "experts"])
def test_own_values_change_nothing_anywhere(olmoe, over):
    examples = CLEAN[-1:] if over == "tokens" else CLEAN
    found = patching_map(olmoe, examples, Run(olmoe, CLEAN), over=over, layers=[0, 2], **QUIET)
    effects = found.effects["effect"]
    assert len(effects) > 9
    assert (effects == 0).all()
    assert (found.table["p_value"] == 1).all()
    assert found.table["normalised"].isna().all(), "0 / 0"


def test_the_whole_stream_after_the_last_layer_gives_the_sources_score(olmoe, pairs):
    clean, corrupted = pairs
    found = patching_map(olmoe, corrupted, Run(olmoe, clean), positions=["question", "last"], **QUIET)
    last = found.effects[(found.effects["layer"] == 2) & (found.effects["position"] == "last")]
    assert last["score"].to_numpy() == pytest.approx(last["source"].to_numpy(), abs=1e-5)
    assert not np.allclose(last["source"], last["unpatched"], atol=1e-2)
    whole = evaluate(olmoe, clean, metrics=["logit_difference"], **QUIET).answers
    assert last["source"].tolist() == pytest.approx(whole["logit_difference"].tolist(), abs=1e-5)
    one = patching_map(olmoe, corrupted[:1], Run(olmoe, clean), positions=["last"], layers=[2], **QUIET).table
    assert one["normalised"].tolist() == pytest.approx([1], abs=1e-4)
    before = found.effects[(found.effects["layer"] == 2) & (found.effects["position"] == "question")]
    assert before["effect"].abs().max() < 1e-5, "nothing reads the stream of earlier tokens after the last layer"


def test_noising_is_the_same_map_with_the_runs_changed_places(olmoe, pairs):
    clean, corrupted = pairs
    there, back = (
        patching_map(olmoe, ours, Run(olmoe, theirs), positions=["prompt"], **QUIET).effects
        for ours, theirs in ((clean, corrupted), (corrupted, clean))
    )
    assert there["source"].tolist() == pytest.approx(back["unpatched"].tolist(), abs=1e-5)
    assert there["score"].tolist() == pytest.approx(back["unpatched"].tolist(), abs=1e-4), "all of it in every layer"


def logit_difference(lens, example, hook=None, layer=1):
    """Of the bare model, with a forward hook on a layer."""
    prompt = encode(example, lens.tokenizer)
    gold, rival = (
        encode(replace(example, answers=(text,)), lens.tokenizer, with_answer=True).input_ids[prompt.prompt_length]
        for text in (example.answers[0], example.original_answer)
    )
    block = lens.module.model.layers[layer]
    handle = block.register_forward_hook(hook) if hook else None
    try:
        with torch.no_grad():
            logits = lens.module(torch.tensor([prompt.input_ids])).logits[0, -1]
    finally:
        if handle:
            handle.remove()
    return float(logits[gold] - logits[rival])


def test_every_token_of_a_layer_equals_plain_hooks(olmoe, pairs):
    clean, corrupted = (half[2] for half in pairs)
    kept = []

    def keep(module, args, output):
        kept.append(output[0] if isinstance(output, tuple) else output)

    source = logit_difference(olmoe, clean, keep)
    found = patching_map(olmoe, [corrupted], Run(olmoe, [clean]), over="tokens", layers=[1], **QUIET)
    rows = found.table.set_index("position")
    length = len(encode(clean, olmoe.tokenizer).input_ids)
    assert len(rows) == length
    assert rows["source"].iloc[0] == pytest.approx(source, abs=1e-4)
    for place in range(0, length, 7):

        def put(module, args, output, place=place):
            stream = (output[0] if isinstance(output, tuple) else output).clone()
            stream[:, place] = kept[0][:, place]
            return (stream, *output[1:]) if isinstance(output, tuple) else stream

        row = rows.loc[str(place + 1 - length)]
        assert row["patched"] == pytest.approx(logit_difference(olmoe, corrupted, put), abs=1e-4)
        token = encode(corrupted, olmoe.tokenizer).input_ids[place]
        assert row["token"] == olmoe.tokenizer.decode([token])
    assert rows["effect"].abs().max() > 1e-2


def test_an_experts_cell_is_evaluates_own_answer_under_its_patch(olmoe, pairs):
    clean, corrupted = pairs
    source = Run(olmoe, clean, under=(Zero(ExpertSet.of({0: [0, 1, 2]})),))
    found = patching_map(olmoe, corrupted, source, over="experts", metric="answer_log_probability", **QUIET)
    table = found.table.set_index(["layer", "expert"])
    assert len(table) == 3 * olmoe.architecture.n_experts
    layer, expert = table["effect"].abs().idxmax()
    own = Patch(source, what="expert_outputs", experts=ExpertSet.of({layer: [expert]}), positions="prompt")
    told = evaluate(olmoe, corrupted, {"own": own}, metrics=["answer_log_probability"], **QUIET).answers
    scores = told.pivot(index="id", columns="intervention", values="answer_log_probability")
    row = table.loc[(layer, expert)]
    assert row["effect"] == pytest.approx((scores["own"] - scores["none"]).mean(), abs=1e-5)
    assert abs(row["effect"]) > 1e-3
    with olmoe.intervene(*source.under):
        asked = [replace(example, context=one.context) for example, one in zip(corrupted, clean, strict=True)]
        whole = olmoe.answer_log_probabilities(asked, with_end=False, **QUIET)
    assert row["source"] == pytest.approx(np.mean(whole), abs=1e-5), "not scored by the source's run"


def answer_length(prediction: str, example: Example) -> float:
    return float(len(prediction))


@pytest.mark.parametrize("metric", ["logit_difference", "answer_log_probability", answer_length])
def test_one_by_one_and_in_batches_are_the_same(olmoe, pairs, metric):
    clean, corrupted = pairs
    run = {"positions": ["question", "last"], "metric": metric, "max_new_tokens": 3} | QUIET
    together, alone = (
        patching_map(olmoe, corrupted, Run(olmoe, clean), batch_size=size, **run).effects for size in (3, 1)
    )
    pd.testing.assert_frame_equal(together, alone, rtol=1e-4, atol=1e-4)


def test_the_table_sums_up_the_effects_with_intervals_and_corrected_tests(olmoe, pairs):
    clean, corrupted = pairs
    unknown = replace(clean[0], id="3", original_answer=None)
    found = patching_map(olmoe, [*corrupted, unknown], Run(olmoe, [*clean, unknown]), positions=["last"], **QUIET)
    row = found.table.iloc[0]
    own = found.effects.iloc[:4]
    assert (row["n"], row["missing"]) == (3, 1)
    known = own[own["id"] != "3"]
    assert row["effect"] == pytest.approx((known["score"] - known["unpatched"]).mean())
    assert row["effect_low"] < row["effect"] < row["effect_high"]
    assert (found.table["p_value"] <= found.table["q_value"]).all()
    shares = found.table["normalised"]
    assert shares.isna().all(), "three random runs differ for certain"
    alike = [replace(corrupted[0], id=str(place)) for place in range(6)]
    source = Run(olmoe, [replace(clean[0], id=one.id, question=f"{one.question}{one.id}") for one in alike])
    row = patching_map(olmoe, alike, source, positions=["last"], layers=[1], **QUIET).table.iloc[0]
    assert row["normalised"] == pytest.approx(row["effect"] / (row["source"] - row["unpatched"]))
    assert row["normalised_low"] < row["normalised"] < row["normalised_high"]


def test_a_finished_part_is_not_computed_again(olmoe, pairs, tmp_path, monkeypatch):
    clean, corrupted = pairs
    run = {"positions": ["last"], "batch_size": 2, "out": tmp_path} | QUIET
    first = patching_map(olmoe, corrupted, Run(olmoe, clean), **run)
    monkeypatch.setattr(type(olmoe), "next_token_log_probabilities", lambda *args, **named: pytest.fail("ran again"))
    again = patching_map(olmoe, corrupted, Run(olmoe, clean), **run)
    pd.testing.assert_frame_equal(first.table, again.table)
    with pytest.raises(pytest.fail.Exception, match="ran again"):
        patching_map(olmoe, corrupted, Run(olmoe, clean, under=(Zero(ExpertSet.of({0: [1]})),)), **run)
    asked_otherwise = MoELens(olmoe.module, olmoe.tokenizer, template="plain", progress=False)
    assert Patch(Run(asked_otherwise, clean)).digest != Patch(Run(olmoe, clean)).digest, "parts of one are the other's"


def test_the_source_runs_once_for_all_cells_of_a_batch(olmoe, pairs, monkeypatch):
    clean, corrupted = pairs
    ran = []
    records = type(olmoe).records

    def counted(lens, examples, **options):
        ran.append([example.id for example in examples])
        return records(lens, examples, **options)

    monkeypatch.setattr(type(olmoe), "records", counted)
    patching_map(olmoe, corrupted, Run(olmoe, clean), positions=["question", "last"], batch_size=2, **QUIET)
    assert sorted(name for ids in ran for name in ids) == ["0", "1", "2"]


def test_what_no_map_can_be_made_of_is_refused(olmoe, pairs):
    clean, corrupted = pairs
    source = Run(olmoe, clean)
    with pytest.raises(MoELensError, match="has no example 'other'"):
        patching_map(olmoe, [replace(clean[0], id="other")], source, **QUIET)
    with pytest.raises(MoELensError, match="an id of its own"):
        patching_map(olmoe, [clean[0], clean[0]], source, **QUIET)
    with pytest.raises(MoELensError, match="so that tokens do not match"):
        longer = Run(olmoe, [replace(example, context=f"{example.context} More.") for example in clean])
        patching_map(olmoe, corrupted, longer, over="tokens", **QUIET)
    with pytest.raises(MoELensError, match="goes over positions, tokens or experts"):
        patching_map(olmoe, corrupted, source, over="heads", **QUIET)
    with pytest.raises(MoELensError, match="patches their expert_outputs"):
        patching_map(olmoe, corrupted, source, over="experts", what="residual", **QUIET)
    with pytest.raises(MoELensError, match="nothing is to be patched"):
        patching_map(olmoe, corrupted, source, layers=[], **QUIET)
    with pytest.raises(MoELensError, match=r"no prompt has a token at \(-999,\)"):
        patching_map(olmoe, corrupted, source, positions=[(-999,)], **QUIET)
    with pytest.raises(MoELensError, match="logit_difference is defined for none of the examples"):
        same = [replace(example, original_answer=example.answers[0]) for example in corrupted]
        patching_map(olmoe, same, source, positions=["last"], layers=[0], **QUIET)
    with pytest.raises(MoELensError, match="the model has layers 0 to 2"):
        patching_map(olmoe, corrupted, source, layers=[3], **QUIET)
    with pytest.raises(MoELensError, match="call it outside"), olmoe.intervene(Zero(ExpertSet.of({0: [1]}))):
        patching_map(olmoe, corrupted, source, **QUIET)
