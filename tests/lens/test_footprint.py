"""Footprints: bytes and operations told from a configuration are those of the model and of what it really captures."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, build_model
from torch.utils.flop_counter import FlopCounterMode

from moe_lens import MoELens, doctor
from moe_lens.architecture import MoEArchitecture
from moe_lens.architecture.tiny import tiny_config
from moe_lens.commands import console
from moe_lens.commands.size_plan import parse_work, published
from moe_lens.errors import MoELensError
from moe_lens.lens.footprint import DEVICES, Footprint, Work, plan_rows
from moe_lens.lens.loading import load_skeleton
from moe_lens.lens.record import CAPTURES
from moe_lens.routing import Routing

TEXTS = ["the cat sat on the mat", "a dog slept", "the sun"]


def of(lens: MoELens) -> Footprint:
    return Footprint.of(lens.module, lens.architecture)


def held(value: object) -> int:
    parts = (value.logits, value.indices, value.weights) if isinstance(value, Routing) else (value,)
    return sum(part.numel() * part.element_size() for part in parts)


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_captures_bytes_are_those_of_the_record(capture, lens):
    if not list(CAPTURES[capture].layers(lens.architecture)) and capture != "logits":
        return  # this family has none, and the plan says 0 bytes
    [record] = lens.records(TEXTS, capture=("routing", capture), positions=(0, -2), progress=False)
    batch, width = record.input_ids.shape
    found = held(record.logits) if capture == "logits" else sum(map(held, record.captured[capture].values()))
    told = of(lens).captured(capture, rows=batch, kept=len(record.kept), width=width)
    assert found == told


def test_bytes_in_half_precision_are_no_more_than_told(tokenizer):
    for family in FAMILIES:
        lens = MoELens.from_pretrained(build_model(family, len(tokenizer)).to(torch.bfloat16), tokenizer)
        [record] = lens.records(TEXTS, capture=("routing", "residual"), positions="all", progress=False)
        batch, width = record.input_ids.shape
        for capture in ("routing", "residual"):
            found = sum(map(held, record.captured[capture].values()))
            told = of(lens).captured(capture, rows=batch, kept=width, width=width)
            assert told / 2 < found <= told


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_of_a_configuration_are_those_of_the_model(family, tokenizer, tmp_path):
    tiny_config(family, vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        model = build_of(tmp_path, dtype)
        skeleton = load_skeleton(tmp_path, dtype=dtype)
        told = Footprint.of(skeleton, MoEArchitecture.of(skeleton))
        assert told.weights == sum(one.nbytes for one in model.parameters())
        [row] = [row for row in plan_rows(told, Work(1, 8, 1))["weights"] if row["dtype"] == name]
        assert row["gigabytes"] * 1e9 == pytest.approx(told.weights, rel=1e-3)  # a few numbers stay in float32


def build_of(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)


def test_operations_of_a_pass_are_those_that_are_counted(lens):
    """By torch's own counter, with an attention that computes each pair of tokens, of which causal ones are half."""
    ids = torch.arange(2, 66)[None].repeat(2, 1) % 300 + 2
    attention = lens.module.config._attn_implementation
    lens.module.set_experts_implementation("eager")
    lens.module.set_attn_implementation("eager")
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            lens.module(input_ids=ids, use_cache=False)
    finally:
        lens.module.set_experts_implementation("grouped_mm")
        lens.module.set_attn_implementation(attention)
    by_kind = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    pairs = by_kind["aten.bmm"]
    assert of(lens).flops(ids.numel(), 64) == pytest.approx(sum(by_kind.values()) - pairs / 2, rel=0.02)


class LiveBytes(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes that tensors made inside the block held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        import weakref

        found = function(*arguments, **(named or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor) and tensor._base is None and not getattr(tensor, "_seen", False):
                tensor._seen = True
                self.now += tensor.nbytes
                weakref.finalize(tensor, self._gone, tensor.nbytes)
        self.most = max(self.most, self.now)
        return found

    def _gone(self, count: int) -> None:
        self.now -= count


def test_working_memory_is_told_within_a_factor_of_three(olmoe):
    ids = torch.arange(256)[None].repeat(4, 1) % 300 + 2
    with LiveBytes() as live, torch.no_grad():
        olmoe.module(input_ids=ids, use_cache=False, logits_to_keep=1)
    told = of(olmoe).working(Work(4, 256, 4))
    assert live.most / 3 < told < live.most * 3


SIZES = {  # billions of parameters, in all and of a token, as their authors published them
    "deepseek-v3": (671, 37),
    "gpt-oss-120b": (117, 5.1),
    "mixtral-8x22b": (141, 39),
    "olmoe-1b-7b": (6.9, 1.3),
    "qwen3-235b-a22b": (235, 22),
    "qwen3-30b-a3b": (30.5, 3.3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_known_models_have_their_published_sizes(name):
    module = load_skeleton(published()[name])
    told = Footprint.of(module, MoEArchitecture.of(module))
    counted = told.counts.activated - (told.counts.embedding if name == "gpt-oss-120b" else 0)  # theirs is without it
    assert (told.counts.total / 1e9, counted / 1e9) == pytest.approx(SIZES[name], rel=0.02)
    assert told.weights == 2 * told.counts.total
    devices = [told.devices(one, Work(1, 512, 8), 2) for one in DEVICES]
    assert devices[0] >= devices[-1] >= told.weights / (192e9)


def test_every_known_model_has_a_size_here():
    assert set(SIZES) == set(published())


def test_a_sweep_takes_a_pass_for_each_expert_less_what_resuming_saves(olmoe):
    """3 layers of 8 experts: whole 1 + 24; resumed 1 + 8 * (3 + 2 + 1) / 3."""
    count = olmoe.architecture.n_experts
    assert of(olmoe).sweep_passes() == (1 + count * 2, 1 + count * 3)


def run(line, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["doctor", *line.split()])
    with pytest.raises(SystemExit) as ended:
        console.run(doctor.main)
    return ended.value.code or 0


def test_the_doctor_says_a_plan_from_the_configuration_alone(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(MoELens, "from_pretrained", None)
    assert run("--plan organism --work 100x64x8 --json", monkeypatch) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["found"]["parameters"] == 1896576 or told["found"]["parameters"] > 1e6
    assert {row["capture"] for row in told["captures"]} == set(CAPTURES)
    assert run("--plan organism", monkeypatch) == 0
    assert "Devices that hold weights and a batch" in capsys.readouterr().out
    assert run("--plan organism --model organism", monkeypatch) == 2
    assert "give it alone" in capsys.readouterr().err
    assert run("--plan organism --work 100", monkeypatch) == 2
    for text in ("0x1x1", "1x1", "axbxc"):
        with pytest.raises(MoELensError, match="EXAMPLESxTOKENSxBATCH"):
            parse_work(text)
