"""AttentionMass and gains: by hand, against eager maps, streaming against whole batches."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from moe_lens import MoELens
from moe_lens.architecture.tiny import tiny_model, tiny_tokenizer
from moe_lens.data import Example, encode
from moe_lens.errors import MoELensError
from moe_lens.lens import Record, Statistic
from moe_lens.metrics import attention_gain
from moe_lens.statistics import AttentionMass

EXAMPLES = [
    Example("long", "The capital of Arland is Belmor, where Belmor dogs sleep.", "What is the capital?", ("Belmor",)),
    Example("closed", "", "What is the capital of Arland?", ("Belmor",)),
    Example("short", "The cat sat.", "What sat?", ("cat",)),
    Example("absent", "The cat sat on the mat.", "What slept?", ("the dog",)),
]


def hand_record() -> Record:
    """Two layers, two heads, one query: row 0 has five tokens, row 1 a pad and four."""
    first = torch.tensor([[[[0.1, 0.2, 0.3, 0.2, 0.2]], [[0.5, 0.1, 0.1, 0.1, 0.2]]]])
    second = torch.tensor([[[[0.0, 0.4, 0.1, 0.1, 0.4]], [[0.0, 0.2, 0.2, 0.3, 0.2]]]])
    rows = torch.cat([first, second])
    return Record(
        ids=("a", "b"),
        input_ids=torch.arange(10).view(2, 5),
        attention_mask=torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]),
        context_spans=(slice(1, 4), slice(2, 4)),
        question_spans=(slice(4, 5), None),
        answer_spans=((slice(1, 2), slice(3, 4), slice(3, 4)), ()),
        kept=torch.tensor([4]),
        captured={"attention": {0: rows, 3: rows.flip(1)}},
    )


def masses(table: pd.DataFrame) -> dict:
    return {(row.layer, row.target, row.id): pytest.approx(row.mass, abs=1e-6) for row in table.itertuples()}


def test_a_hand_case_of_two_layers():
    table = AttentionMass().update(hand_record()).table()
    assert masses(table) == {
        (layer, target, name): mass
        for layer in (0, 3)
        for (target, name), mass in {
            ("context", "a"): (0.7 + 0.3) / 2,
            ("context", "b"): (0.2 + 0.5) / 2,
            ("answer", "a"): (0.4 + 0.2) / 2,  # both occurrences, one of them named twice; b's is nowhere
        }.items()
    }
    assert list(table.columns) == ["layer", "step", "target", "id", "mass"]


def test_heads_are_kept_apart_and_averaged_as_chosen():
    mass = AttentionMass(("context",)).update(hand_record())
    heads = mass.head_table().query("id == 'a'").set_index(["layer", "head"])["mass"]
    assert heads.to_dict() == pytest.approx({(0, 0): 0.7, (0, 1): 0.3, (3, 0): 0.3, (3, 1): 0.7})
    some = mass.table(heads={3: [1]}).set_index(["layer", "id"])["mass"].to_dict()
    assert some == pytest.approx({(3, "a"): 0.7, (3, "b"): 0.2})
    with pytest.raises(MoELensError, match=r"no such \(layer, head\): \[\(3, 7\)\]"):
        mass.table(heads={3: [7]})


def test_the_first_token_is_after_the_pads_and_the_sink_gets_what_no_token_does():
    table = AttentionMass(("first", "sink", "question")).update(hand_record()).table()
    found = masses(table.query("layer == 0"))
    assert found == {
        (0, "first", "a"): 0.3,
        (0, "first", "b"): 0.3,
        (0, "sink", "a"): 0.0,
        (0, "sink", "b"): 0.05,
        (0, "question", "a"): 0.2,
    }


def eager_map(lens, ids):
    lens.module.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return lens.module(torch.tensor([ids]), output_attentions=True).attentions
    finally:
        lens.module.set_attn_implementation("sdpa")


@pytest.mark.parametrize("continued", [False, True], ids=["gold", "generated"])
def test_prefill_and_decoding_steps_equal_eager_maps_of_prompts_alone(lens, continued):
    steps = (-2, 0, 1)
    texts = ["Belmor and a cat", "no", "dog", "a"]
    answers = {"continuations": texts} if continued else {}
    mass = AttentionMass(steps=steps)
    lens.measure(EXAMPLES, mass, batch_size=3, progress=False, **answers)
    got = mass.table().set_index(["id", "layer", "step", "target"])["mass"]
    expected = {}
    for example, text in zip(EXAMPLES, texts, strict=True):
        appended = replace(example, answers=(text,)) if continued else example
        ids = encode(appended, lens.tokenizer, with_answer=True).input_ids
        encoded = encode(example, lens.tokenizer)
        last = encoded.prompt_length - 1
        answer = sorted({i for span in encoded.answer_spans for i in range(span.start, span.stop)})
        context = list(range(*encoded.context.indices(10**6))) if encoded.context else []
        for layer, rows in enumerate(eager_map(lens, ids)):
            for step in steps:
                if step >= len(ids) - last - 1:
                    continue
                row = rows[0, :, last + step].mean(0)
                for target, where in (("context", context), ("answer", answer)):
                    if where:
                        expected[example.id, layer, step, target] = float(row[where].sum())
    assert got.to_dict() == pytest.approx(expected, abs=1e-5)
    assert {step for _, _, step, _ in expected} == set(steps)


def test_batching_merging_and_order_change_nothing(olmoe):
    [whole] = olmoe.measure(EXAMPLES, AttentionMass(), batch_size=4, progress=False)
    [one], [rest] = (
        olmoe.measure(part, AttentionMass(), batch_size=1, progress=False) for part in (EXAMPLES[2:], EXAMPLES[:2])
    )
    merged = one.merge(rest).table()
    pd.testing.assert_frame_equal(merged, whole.table(), atol=1e-6)
    assert isinstance(whole, Statistic)


def test_a_model_against_itself_has_no_gain(olmoe):
    [mass] = olmoe.measure(EXAMPLES, AttentionMass(), progress=False)
    gains = attention_gain(mass.table(), mass.table(), resamples=50)
    assert sorted(gains["target"].unique()) == ["answer", "context"]
    for name in ("gain", "median", "ratio_of_means"):
        assert (gains[name] == 0).all()
        assert gains[[f"{name}_low", f"{name}_high"]].isna().all(axis=None), "two examples do not say how others spread"
    per_head = attention_gain(mass.head_table(), mass.head_table(), resamples=50)
    assert len(per_head) == len(gains) * 4


def test_misuse_is_refused(olmoe):
    with pytest.raises(MoELensError, match="targets must be among"):
        AttentionMass(("contexts",))
    with pytest.raises(MoELensError, match="different whole numbers"):
        AttentionMass(steps=(1, 1))
    [last] = olmoe.records(EXAMPLES, capture=("attention",), progress=False)
    with pytest.raises(MoELensError, match=r"ask for positions=\(-1,\)"):
        AttentionMass(steps=(-1,)).update(last)
    with pytest.raises(MoELensError, match="holds no attention"):
        AttentionMass().update(replace(hand_record(), captured={}))
    with pytest.raises(MoELensError, match="seen no example"):
        AttentionMass(steps=(3,)).update(hand_record()).table()
    with pytest.raises(MoELensError, match="equal settings"):
        AttentionMass().merge(AttentionMass(steps=(1,)))
    with pytest.raises(MoELensError, match="one continuation for each"):
        olmoe.measure(EXAMPLES, AttentionMass(), continuations=["a"], progress=False)


def test_attention_to_summaries_of_positions_is_refused():
    """DeepSeek-V4 attends to compressed stretches of the prompt too, which lie in no part of it alone."""
    lens = MoELens(tiny_model("deepseek_v4"), tiny_tokenizer())
    with pytest.raises(MoELensError, match=r"layer 0 attends to \d+ summaries of several positions"):
        lens.measure(EXAMPLES[2:3], AttentionMass(), progress=False)
