"""What things are called when printed: short, and naming what matters."""

import pytest
import torch
from test_digests import Halved, Scale

from moe_lens.data import Example
from moe_lens.experts import ExpertSet
from moe_lens.lens import CAPTURES, Renormalize, Reroute, Rows, Zero

FEW, MANY = ExpertSet.of({3: [5, 7], 4: [0]}), ExpertSet.of({layer: range(16) for layer in range(40)})
EXAMPLES = [Example("a", "The cat sat.", "Who sat?", ("The cat",)), Example("b", "", "Who slept?", ("the dog",))]


def assert_said(thing: object, *parts: str) -> None:
    """Its repr is short, of one line, and has these parts."""
    text = repr(thing)
    assert len(text) < 200, text
    assert "\n" not in text
    assert text.startswith(type(thing).__name__ + "(")
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("thing", "parts"),
    [
        (FEW, ["'3:5,7;4:0'"]),
        (MANY, ["640 experts in 40 layers"]),
        (Zero(FEW), ["'3:5,7;4:0'"]),
        (Renormalize(FEW), ["'3:5,7;4:0'"]),
        (Reroute(MANY), ["640 experts in 40 layers"]),
        (Rows((Zero(FEW), None, Zero(FEW), Reroute(MANY)) * 500), ["2000 rows", "2 different"]),
        (Halved(2, 0.5), ["layer=2", "by=0.5"]),
        (Halved(2, Zero(MANY)), ["by=Zero(640 experts in 40 layers)"]),
        (Halved(2, list(range(1000))), ["layer=2", "by=[0, 1, 2"]),
        (Scale(torch.rand(64, 3)), ["factors=float32 [64, 3]", "acting=(1,)"]),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_experts_and_interventions(thing, parts):
    assert_said(thing, *parts)


def test_a_lens_and_its_architecture(lens, family):
    architecture = lens.architecture
    sizes = ["3 layers", f"{architecture.n_experts} experts", "3 per token"]
    sizes += [f"and {architecture.n_shared_experts} shared"] * bool(architecture.n_shared_experts)
    sizes += ["(2 with experts)"] * (len(architecture.moe) == 2)
    assert_said(architecture, *sizes, str(architecture.scoring))
    assert_said(lens, type(lens.module).__name__, *sizes, "float32 on cpu")
    assert "under" not in repr(lens)
    layer = architecture.moe_layers[0]
    with lens.intervene(Zero(ExpertSet.of({layer: [1]})), Rows((None, None))):
        assert_said(lens, f"under Zero('{layer}:1'), Rows(2 rows, 0 different")


def test_records_and_routing(olmoe, lenses):
    [record] = olmoe.records(EXAMPLES, progress=False)
    batch, width = record.input_ids.shape
    assert_said(record, f"{batch} x {width} tokens", "routing of 3 layers")
    assert "answers" not in repr(record)
    assert_said(record.routing[1], f"{batch} x {width} tokens", "3 of 8 experts each")
    whole = lenses["deepseek_v3"]
    [record] = whole.records(EXAMPLES, capture=tuple(CAPTURES), with_answer=True, progress=False)
    assert_said(record, *CAPTURES, "of 2 layers", "of 3 layers", "answers")
    [record] = olmoe.records(EXAMPLES, capture=(), progress=False)
    assert_said(record, "nothing captured")
