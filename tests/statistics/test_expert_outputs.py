"""Saliency, the logit lens on experts, the likeness of their outputs: by hand, and on models by a second way."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from test_usage import record

from moe_lens import MoELens
from moe_lens.architecture.tiny import tiny_model, tiny_tokenizer
from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.routing import Routing
from moe_lens.statistics import (
    ExpertPortraits,
    ExpertSaliency,
    ExpertUsage,
    ExpertVocabulary,
    OutputSimilarity,
    SharedShare,
)

TEXTS = ["the cat sat on the mat", "The capital of Arland is", "a dog slept"]


def hand_record():
    """One row of a pad and two tokens, two of four experts each, outputs in the plane."""
    indices = torch.tensor([[[3, 3], [0, 1], [1, 2]]])
    weights = torch.tensor([[[9.0, 9.0], [0.5, 0.25], [0.75, 0.5]]])
    outputs = torch.tensor([[[[99.0, 99.0], [99.0, 99.0]], [[3.0, 4.0], [0.0, 2.0]], [[0.0, -4.0], [6.0, 8.0]]]])
    base = replace(record([2], layers=(), pads=1), kept=torch.arange(3))
    routing = Routing(torch.zeros(1, 3, 4), indices, weights)
    return replace(base, captured={"routing": {2: routing}, "expert_outputs": {2: outputs}})


def test_saliency_by_hand():
    table = ExpertSaliency().update(hand_record()).table()
    assert table["tokens"].tolist() == [1, 2, 1, 0]
    assert table["reap"].tolist() == pytest.approx([0.5 * 5, (0.25 * 2 + 0.75 * 4) / 2, 0.5 * 10, 0])
    assert table["ean"].tolist() == pytest.approx([5, 6, 10, 0])
    assert ExpertSet.top(table, 1, score="reap") == ExpertSet.of({2: [2]})


def test_similarity_by_hand():
    table = OutputSimilarity().update(hand_record()).table().set_index(["expert", "other"])["similarity"]
    assert table[0, 1] == table[1, 0] == pytest.approx(4 / 5)
    assert table[1, 2] == pytest.approx(-8 / 10)
    assert np.isnan(table[0, 2])


def test_the_share_of_shared_experts_by_hand():
    given = hand_record()
    shared = {2: torch.tensor([[[99.0, 99.0], [4.5, 6.0], [-8.0, 6.0]]])}
    given = replace(given, captured={**given.captured, "shared_output": shared})
    routed = np.array([[1.5, 2.5], [3.0, 1.0]])  # 0.5 (3, 4) + 0.25 (0, 2), and 0.75 (0, -4) + 0.5 (6, 8)
    norms = np.hypot(*routed.T)
    row = SharedShare().update(given).table().iloc[0]
    assert row[["tokens", "shared"]].tolist() == [2, (7.5 + 10) / 2]
    assert row["routed"] == pytest.approx(norms.mean())
    assert row["share"] == pytest.approx((7.5 / (7.5 + norms[0]) + 10 / (10 + norms[1])) / 2)
    cosines = (4.5 * 1.5 + 6 * 2.5) / 7.5 / norms[0], (-8 * 3 + 6 * 1) / 10 / norms[1]
    assert row["cosine"] == pytest.approx(np.mean(cosines))


def test_shared_and_routed_outputs_are_what_the_block_gives(lens):
    if not any(site.shared_experts for site in lens.architecture.moe):
        with pytest.raises(MoELensError, match="no shared_output"):
            lens.measure(TEXTS, SharedShare(), progress=False)
        return
    [found] = lens.measure(TEXTS, SharedShare(), progress=False)
    state = SharedShare().add_state(found.state()).merge(SharedShare()).table()
    pd.testing.assert_frame_equal(state, found.table())
    capture = ("shared_output", "moe_output", "routing")
    [record] = lens.records(TEXTS, capture=capture, positions="all", progress=False)
    real = record.attention_mask.bool()
    for row in found.table().itertuples():
        shared, whole = (part[row.layer][real] for part in (record.shared_output, record.moe_output))
        norms = shared.norm(dim=-1), (whole - shared).norm(dim=-1)
        assert row.share == pytest.approx(float((norms[0] / (norms[0] + norms[1])).mean()), abs=1e-5)


def test_portraits_are_router_rows_and_mean_outputs_whatever_the_parts(olmoe):
    whole, first, rest = (
        olmoe.measure(texts, ExpertPortraits(olmoe), batch_size=1, progress=False)[0]
        for texts in (TEXTS, TEXTS[:1], TEXTS[1:])
    )
    joined = ExpertPortraits(None).add_state(first.state()).merge(rest)
    table = joined.table()
    pd.testing.assert_frame_equal(table, whole.table(), rtol=1e-9)
    [record] = olmoe.records(TEXTS, capture=("routing", "expert_outputs"), positions="all", progress=False)
    layer, real = 1, record.attention_mask.bool()
    indices, outputs = record.routing[layer].indices[real], record.expert_outputs[layer][real]
    expert = int(indices.flatten().mode().values)
    own = table.query("layer == @layer and expert == @expert").iloc[0]
    assert own["tokens"] == (indices == expert).sum()
    assert own["output"] == pytest.approx(float(outputs[indices == expert].mean(0).norm()), rel=1e-4)
    matched = joined.matched(whole)
    rows = matched[matched["by"] == "router rows"]
    assert rows["similarity"].to_numpy() == pytest.approx(1)
    weight = olmoe.module.get_submodule(olmoe.architecture.at(0).router).weight.detach()
    cosines = torch.nn.functional.cosine_similarity(weight[2][None], weight)
    assert rows.query("layer == 0 and expert == 2")["average"].item() == pytest.approx(float(cosines.mean()), abs=1e-5)


def test_what_an_expert_writes_by_hand():
    """The vocabulary is the two axes and their opposites; the data have the middle two, the pad is the first."""
    project = torch.nn.Linear(2, 4, bias=False)
    axes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    with torch.no_grad():
        project.weight.copy_(axes)
    given = replace(hand_record(), input_ids=torch.tensor([[0, 1, 2]]))
    statistic = ExpertVocabulary(project, top=1).update(given)
    table = statistic.table()
    written = np.array([[1.5, 2.0], [0.0, (0.5 - 3) / 2], [3.0, 4.0]])
    logits, excess = (values @ axes.numpy().T for values in (written, written - written.mean(0)))
    assert table["expert"].tolist() == [0, 0, 1, 1, 2, 2]  # the fourth wrote nothing
    assert table["read"].tolist() == [True, False] * 3
    best = [[1, 0], [2, 3], [1, 0]]  # of the excesses: 0, 0.42; -1.5, -2.83 turned round; 1.5, 2.42
    assert table["token_id"].tolist() == [token for pair in best for token in pair]
    for name, values in (("logit", logits), ("excess", excess)):
        assert table[name].tolist() == pytest.approx([values[e, token] for e in range(3) for token in best[e]])
    joined = ExpertVocabulary(project, top=1).merge(statistic)
    pd.testing.assert_frame_equal(joined.table(), table)
    pd.testing.assert_frame_equal(ExpertVocabulary(project, top=1).add_state(joined.state()).table(), table)
    kept = joined.state()
    with pytest.raises(MoELensError, match="without the tokens that were read"):
        ExpertVocabulary(project, top=1).add_state(kept[kept["layer"] >= 0])


def single_expert(lens, layer, expert, inputs):
    """One expert on hidden states [token, d_model], by calling the block's experts with this one alone."""
    experts = lens.module.get_submodule(lens.architecture.at(layer).experts)
    ones = torch.ones(len(inputs), 1)
    return experts(inputs, torch.full((len(inputs), 1), expert), ones)


def test_on_models_each_equals_single_experts_run_apart(lens):
    layer = lens.architecture.moe_layers[-1]
    seen = []
    experts = lens.module.get_submodule(lens.architecture.at(layer).experts)
    head = lens.module.get_submodule(lens.architecture.head)
    hook = experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    try:
        [whole] = lens.records(TEXTS, capture=("routing",), batch_size=3, progress=False)
    finally:
        hook.remove()
    statistics = ExpertSaliency(), ExpertVocabulary(head, top=3), OutputSimilarity()
    lens.measure(TEXTS, *statistics, ExpertUsage(), batch_size=2, progress=False)
    saliency, written, alike = (
        table[table["layer"] == layer].set_index(["expert", *more])
        for table, more in zip((one.table() for one in statistics), ([], ["rank"], ["other"]), strict=True)
    )
    real = whole.attention_mask.bool().flatten()
    routing = whole.routing[layer]
    indices, weights = (part.flatten(0, 1)[real] for part in (routing.indices, routing.weights))
    inputs = seen[0].view(len(real), -1)[real]
    added, cosines = {}, {}
    with torch.no_grad():
        outputs = {e: single_expert(lens, layer, e, inputs) for e in set(indices.flatten().tolist())}
    for expert, output in outputs.items():
        gates = (weights * (indices == expert)).sum(1)
        chosen = (indices == expert).any(1)
        row = saliency.loc[expert]
        assert row["tokens"] == chosen.sum()
        assert row["ean"] == pytest.approx(float(output[chosen].norm(dim=1).sum()), rel=1e-4)
        assert row["reap"] == pytest.approx(float((gates * output.norm(dim=1))[chosen].mean()), rel=1e-4)
        added[expert] = (gates[:, None] * output)[chosen].mean(0)
        for other, its in outputs.items():
            both = chosen & (indices == other).any(1)
            if other != expert and both.any():
                cosine = torch.nn.functional.cosine_similarity(output[both], its[both]).mean()
                cosines[expert, other] = float(cosine)
    assert alike["similarity"].dropna().to_dict() == pytest.approx(cosines, abs=1e-4)
    with torch.no_grad():
        logits = {expert: head(vector) for expert, vector in added.items()}
    mean = torch.stack(list(logits.values())).mean(0)
    for expert, own in logits.items():
        best, shown = (own - mean).topk(3), written.loc[expert].nlargest(3, "excess")
        assert shown["excess"].tolist() == pytest.approx(best.values.tolist(), rel=1e-3, abs=1e-4)
        assert shown["logit"].tolist() == pytest.approx(own[best.indices].tolist(), rel=1e-3, abs=1e-4)
    texts = set(whole.input_ids[whole.attention_mask.bool()].tolist())
    assert (written["token_id"].isin(texts) == written["read"]).all()


@pytest.mark.parametrize("make", [ExpertSaliency, OutputSimilarity])
def test_streaming_and_merging_equal_one_pass(olmoe, make):
    examples = [Example(f"no. {place}", "", text, ("a",)) for place, text in enumerate(TEXTS)]
    [whole] = olmoe.measure(examples, make(), batch_size=3, progress=False)
    [first] = olmoe.measure(examples[:1], make(), progress=False)
    [rest] = olmoe.measure(examples[1:], make(), batch_size=1, progress=False)
    pd.testing.assert_frame_equal(rest.merge(first).table(), whole.table(), rtol=1e-4, atol=1e-5)


def test_positions_must_have_been_kept(olmoe):
    [last] = olmoe.records(TEXTS, capture=("routing", "expert_outputs"), progress=False)
    with pytest.raises(MoELensError, match="ask for positions='all'"):
        ExpertSaliency().update(last)
    [saliency] = olmoe.measure(TEXTS, ExpertSaliency("last"), progress=False)
    assert saliency.table().groupby("layer")["tokens"].sum().eq(9).all()
    with pytest.raises(MoELensError, match="at least 1"):
        ExpertVocabulary(lambda written: written, top=0)


def test_a_head_is_not_given_experts_that_write_elsewhere():
    """Muse Spark's experts have a width of their own, and a map to the residual stream after their sum."""
    lens = MoELens(tiny_model("muse_spark"), tiny_tokenizer())
    head = lens.module.get_submodule(lens.architecture.head)
    with pytest.raises(MoELensError, match="whose width of 32 the head takes; these give vectors of 16"):
        lens.measure(TEXTS[:1], ExpertVocabulary(head), progress=False)
