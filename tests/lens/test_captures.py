"""Captures: the router's input, what shared experts add, and others of one's own."""

import pytest
import torch
from conftest import with_squared_shared_experts
from torch.testing import assert_close

from moe_lens.architecture import Moment
from moe_lens.architecture.tiny import tiny_model, tiny_tokenizer
from moe_lens.checks.reference import padded
from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens import CAPTURES, Capture, MoELens, Needs, Zero

TEXTS = ["the cat sat on", "a dog slept in the sun", "xy"]
#: When shared experts run, and how their output, and that of a gate, gets into the block's by the family's own code.
SHARED = {
    "afmoe": (Moment.BEFORE_EXPERTS, lambda output, gate: output),
    "cohere2_moe": (Moment.AFTER_EXPERTS, lambda output, gate: output / 2),
    "deepseek_v3": (Moment.AFTER_EXPERTS, lambda output, gate: output),
    "ernie4_5_moe": (Moment.BEFORE_ROUTER, lambda output, gate: output),
    "llama4_text": (Moment.AFTER_EXPERTS, lambda output, gate: output),
    "qwen2_moe": (Moment.BEFORE_ROUTER, lambda output, gate: gate.sigmoid() * output),
}
STREAMS = ("router_input", "shared_output", "moe_output")


@pytest.fixture(scope="module", params=SHARED)
def opened(request):
    """The name of a family and a lens on a tiny model of it."""
    return request.param, MoELens(tiny_model(request.param), tiny_tokenizer())


def hooked(lens: MoELens) -> dict[str, dict[int, torch.Tensor]]:
    """By plain torch hooks, per MoE layer: router_input, experts, shared, gate and block of the bare model."""
    seen = {name: {} for name in ("router_input", "experts", "shared", "gate", "block")}
    handles = []

    def watch(name: str, layer: int, path: str, *, given: bool = False) -> None:
        def keep(module, inputs, *output):
            value = inputs[0] if given else output[0]
            seen[name][layer] = (value[0] if isinstance(value, tuple) else value).clone()  # others may write into it

        module = lens.module.get_submodule(path)
        handles.append(module.register_forward_pre_hook(keep) if given else module.register_forward_hook(keep))

    for site in lens.architecture.moe:
        block = site.experts.rpartition(".")[0]
        watch("router_input", site.layer, site.router, given=True)
        watch("experts", site.layer, site.experts)
        watch("block", site.layer, block)
        [shared] = [
            name for name in ("shared_experts", "shared_expert") if hasattr(lens.module.get_submodule(block), name)
        ]
        watch("shared", site.layer, f"{block}.{shared}")
        if hasattr(lens.module.get_submodule(block), "shared_expert_gate"):
            watch("gate", site.layer, f"{block}.shared_expert_gate")
    try:
        with torch.no_grad():
            lens.module(**padded(lens, TEXTS))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def test_the_router_input_and_the_shared_output_are_what_hooks_see(opened):
    family, lens = opened
    seen, (moment, entering) = hooked(lens), SHARED[family]
    _, record = lens.run_with_cache(TEXTS, capture=STREAMS)
    assert tuple(record.router_input) == tuple(record.shared_output) == lens.architecture.moe_layers
    for layer, value in record.router_input.items():
        assert value.shape == (*record.input_ids.shape, lens.architecture.d_model)
        assert torch.equal(value, seen["router_input"][layer].view(value.shape))
    for layer, value in record.shared_output.items():
        assert lens.architecture.at(layer).shared_moment == moment
        gate = seen["gate"].get(layer)
        assert (gate is not None) == (lens.architecture.at(layer).shared_gate is not None)
        assert torch.equal(value, entering(seen["shared"][layer], gate).view(value.shape))


def test_the_block_gives_scaled_routed_and_shared_output_together(opened):
    _, lens = opened
    seen = hooked(lens)
    _, record = lens.run_with_cache(TEXTS, capture=STREAMS)
    for site in lens.architecture.moe:
        assert site.passed_through == ()
        shared = record.shared_output[site.layer]
        routed = seen["experts"][site.layer].view(-1, *shared.shape).sum(0)  # some have an axis of experts first
        block = record.moe_output[site.layer]
        assert torch.equal(block, seen["block"][site.layer].view(block.shape))
        assert_close(site.scale_after * routed + shared, block, rtol=1e-6, atol=1e-6)
        assert shared.abs().max() > 1e-3 * block.abs().max()


def test_without_any_routed_expert_the_shared_output_is_left(opened):
    _, lens = opened
    layer = lens.architecture.moe_layers[-1]
    _, plain = lens.run_with_cache(TEXTS, capture=STREAMS)
    with lens.intervene(Zero(ExpertSet.of({layer: range(lens.architecture.n_experts)}))):
        _, masked = lens.run_with_cache(TEXTS, capture=STREAMS)
    assert torch.equal(masked.shared_output[layer], plain.shared_output[layer])
    assert_close(masked.moe_output[layer], masked.shared_output[layer], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(plain.moe_output[layer], plain.shared_output[layer], atol=1e-3)


def test_kept_rows_of_the_new_captures_are_those_of_the_whole_run(opened):
    _, lens = opened
    [whole] = lens.records(TEXTS, capture=STREAMS, positions="all", progress=False)
    [last] = lens.records(TEXTS, capture=STREAMS, positions="last", progress=False)
    for name in STREAMS:
        for layer, value in last.captured[name].items():
            assert value.shape[:2] == (3, 1)
            assert torch.equal(value, whole.captured[name][layer][:, last.kept])
            assert value.untyped_storage().nbytes() == value.nbytes


def test_a_family_without_shared_experts_has_no_such_layers(olmoe):
    assert list(CAPTURES["shared_output"].layers(olmoe.architecture)) == []
    [record] = olmoe.records(TEXTS, capture=("shared_output", "router_input"), progress=False)
    assert record.shared_output == {}
    assert tuple(record.router_input) == olmoe.architecture.moe_layers
    with pytest.raises(MoELensError, match="this model has no shared_output: no layer of it gives any"):
        record.expect({"shared_output", "router_input"})


def test_shared_experts_that_get_in_by_another_way_are_refused(tokenizer):
    lens = MoELens(with_squared_shared_experts(len(tokenizer)), tokenizer)
    assert [site.shared_scale for site in lens.architecture.moe] == [None, None]
    with pytest.raises(MoELensError, match="layer 1 adds its shared experts in its own way; leave 'shared_output' out"):
        lens.run_with_cache(TEXTS, capture=("shared_output",))
    assert lens.run_with_cache(TEXTS, capture=("router_input", "moe_output"))


def test_every_capture_says_what_it_is_and_has_a_property_of_its_name(olmoe):
    [record] = olmoe.records(TEXTS, capture=tuple(CAPTURES), progress=False)
    for name, capture in CAPTURES.items():
        assert (capture.name, bool(capture.about)) == (name, True)
        layers = set(capture.layers(olmoe.architecture))
        assert set(record.captured[name]) == layers
        shown = getattr(record, "attention_rows" if name == "attention" else name)
        assert shown is (record.logits if name == "logits" else record.captured[name])


@pytest.mark.parametrize("family", ["olmoe", "dbrx", "deepseek_v3", "gpt_oss"])
def test_a_batch_without_any_kept_position_gives_captures_without_rows(family):
    lens = MoELens(tiny_model(family), tiny_tokenizer())
    closed_book = [Example("a", "", "What sat?", ("cat",)), Example("b", "", "What is it in the sun?", ("dog",))]
    capture = tuple(name for name in CAPTURES if name not in ("routing", "shared_output") or family == "deepseek_v3")
    ask = {"capture": capture, "progress": False}
    [last], [none] = (list(lens.records(closed_book, **ask, positions=of)) for of in ("last", "context"))
    assert len(none.kept) == 0
    for name in set(capture) - {"routing", "logits"}:
        axis = 2 if name == "attention" else 1
        for layer, values in last.captured[name].items():
            assert none.captured[name][layer].shape == values.narrow(axis, 0, 0).shape
    assert none.logits.shape == last.logits[:, :0].shape


class InputNorms:
    """A statistic of one's own on a capture of one's own."""

    def __init__(self):
        self.needs, self.settings, self.norms = Needs.of({"input_norm"}, "last"), {}, []

    def update(self, record):
        record.expect(self.needs.captures)
        self.norms += record.captured["input_norm"][1][record.kept_mask("last")].tolist()
        return self

    def merge(self, other):
        self.norms += other.norms
        return self

    def table(self):
        return self.norms


def test_a_new_capture_is_an_entry_of_the_table(olmoe, monkeypatch):
    norm = Capture(
        "input_norm",
        "the norm of what the router is given, [batch, row]",
        lambda architecture: architecture.moe_layers[1:],
        ((Moment.ROUTER_INPUT, lambda reader, layer, kept: kept.of(reader.router_input(layer), 1).norm(dim=-1)),),
    )
    monkeypatch.setitem(CAPTURES, "input_norm", norm)
    [record] = olmoe.records(TEXTS, capture=("input_norm", "router_input"), progress=False)
    assert tuple(record.captured["input_norm"]) == olmoe.architecture.moe_layers[1:]
    assert torch.equal(record.captured["input_norm"][1], record.router_input[1].norm(dim=-1))
    [norms] = olmoe.measure(TEXTS, InputNorms(), progress=False)
    assert norms.table() == pytest.approx(record.captured["input_norm"][1][:, 0].tolist())


def test_an_unfilled_record_holds_nothing_and_says_what_to_ask_for(olmoe):
    [record] = olmoe.records(TEXTS, capture=(), progress=False)
    for name in (
        "routing",
        "router_input",
        "expert_outputs",
        "shared_output",
        "moe_output",
        "residual",
        "attention_rows",
    ):
        assert getattr(record, name) == {}
    with pytest.raises(
        MoELensError, match=r"holds no logits, residual; ask for it with capture=\('logits', 'residual'\)"
    ):
        record.expect({"residual", "logits"})
    record.expect(())
