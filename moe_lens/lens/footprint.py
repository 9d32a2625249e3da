"""Footprint: what a model's weights, captures, passes and sweeps will take, told from its configuration alone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from torch import nn

from moe_lens.architecture import MoEArchitecture
from moe_lens.architecture.discovery import text_config
from moe_lens.architecture.sizes import ParameterCounts, parameter_counts
from moe_lens.lens.record import CAPTURES

INDEX = 8
"""Bytes of a selected expert's number in a record."""
SHARE_USED = 0.9
"""Of a device's memory, what can be used."""
GB = 1e9


@dataclass(frozen=True)
class Device:
    """A kind of accelerator. gigabytes: its memory. teraflops: its published peak, dense, in bfloat16."""

    name: str
    gigabytes: float
    teraflops: float


DEVICES = (
    Device("RTX 4090", 24, 165),
    Device("L40S", 48, 362),
    Device("A100 80GB", 80, 312),
    Device("H100", 80, 989),
    Device("H200", 141, 989),
    Device("MI300X", 192, 1307),
)


@dataclass(frozen=True)
class Work:
    """What is measured on: so many examples of so many tokens, a batch of them at a time."""

    examples: int
    tokens: int
    batch: int


@dataclass(frozen=True)
class Footprint:
    """A model's sizes. bytes_each: of a number in its dtype. weights: bytes of its parameters, as they are loaded.

    heads: of the attention. head_width: a head's queries and values, as wide as one of each together.
    expert_width: inner units of a routed expert. n_vocabulary: tokens that the head scores.
    """

    architecture: MoEArchitecture
    counts: ParameterCounts
    weights: int
    bytes_each: int
    heads: int
    head_width: int
    expert_width: int
    n_vocabulary: int

    @classmethod
    def of(cls, module: nn.Module, architecture: MoEArchitecture) -> "Footprint":
        """The sizes of a model, which may be on the meta device."""
        config, counts = text_config(module), parameter_counts(module, architecture)
        d_model, heads = architecture.d_model, int(config.num_attention_heads)
        width = int(getattr(config, "head_dim", None) or d_model // heads)
        keys = int(getattr(config, "qk_nope_head_dim", 0) or 0) + int(getattr(config, "qk_rope_head_dim", 0) or 0)
        per_expert = _numel(module.get_submodule(architecture.moe[0].experts)) // architecture.n_experts
        head = module.get_submodule(architecture.head)
        return cls(
            architecture,
            counts,
            weights=sum(one.numel() * one.element_size() for one in module.parameters()),
            bytes_each=next(module.get_submodule(architecture.head).parameters()).element_size(),
            heads=heads,
            head_width=keys + int(config.v_head_dim) if keys else 2 * width,
            expert_width=max(1, per_expert // (3 * d_model)),
            n_vocabulary=len(next(head.parameters())),
        )

    def weights_in(self, bytes_each: float) -> float:
        """Bytes of all parameters with so many each."""
        return self.counts.total * bytes_each

    def captured(self, name: str, *, rows: int, kept: int, width: int) -> int:
        """Bytes of one of `CAPTURES` in a record: rows of a batch, kept positions, of so many in all.

        At most: a router that works in float32 has its logits and weights in it, and so all are counted.
        """
        k, d_model, size = self.architecture.top_k, self.architecture.d_model, self.bytes_each
        layers = len(list(CAPTURES[name].layers(self.architecture)))
        match name:
            case "logits":
                return rows * kept * self.n_vocabulary * size
            case "routing":  # at all positions
                return layers * rows * width * (4 * self.architecture.n_experts + (4 + INDEX) * k)
            case "attention":
                return layers * rows * kept * width * self.heads * size
            case "expert_outputs":
                return layers * rows * kept * k * d_model * size
        return layers * rows * kept * d_model * size

    def flops(self, tokens: int, width: int) -> float:
        """Floating-point operations of a pass over tokens in texts of this width.

        Two for each weight that a token uses, and those of attention, each token with half of the others on average.
        """
        looked_up = self.counts.embedding if self.counts.head else 0
        attending = (
            sum(path is not None for path in self.architecture.attentions) * self.heads * self.head_width * width
        )
        return tokens * (2 * (self.counts.activated - looked_up) + attending)

    def working(self, work: Work) -> int:
        """Bytes that a pass over a batch has at a time beside weights, roughly: one layer's values, and the stream."""
        tokens, k = work.batch * work.tokens, self.architecture.top_k
        return (
            tokens
            * self.bytes_each
            * (6 * self.architecture.d_model + k * (3 * self.expert_width + self.architecture.d_model))
        )

    def devices(self, device: Device, work: Work, bytes_each: float) -> int:
        """How many of the devices hold the weights, and beside them what a pass with its routing takes."""
        routing = self.captured("routing", rows=work.batch, kept=work.tokens, width=work.tokens)
        whole = self.weights_in(bytes_each) + self.working(work) + routing
        return ceil(whole / (SHARE_USED * device.gigabytes * GB))

    def pass_flops(self, work: Work) -> float:
        """Operations of one pass over all examples."""
        return self.flops(work.examples * work.tokens, work.tokens)

    def sweep_passes(self) -> tuple[float, int]:
        """How many passes the effects of all single experts take: resumed at the expert's layer, and each run whole."""
        n_layers, count = self.architecture.n_layers, self.architecture.n_experts
        resumed = sum(count * (n_layers - layer) / n_layers for layer in self.architecture.moe_layers)
        return 1 + resumed, 1 + count * len(self.architecture.moe_layers)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def plan_rows(footprint: Footprint, work: Work) -> Mapping[str, list[dict[str, Any]]]:
    """The tables of a plan, by name: "weights", "captures", "runs" and "devices"."""
    return {
        "weights": [
            {"dtype": name, "gigabytes": footprint.weights_in(each) / GB}
            for name, each in (("float32", 4), ("bfloat16", 2), ("8 bit", 1), ("4 bit", 0.5))
        ],
        "captures": list(_captures(footprint, work)),
        "runs": list(_runs(footprint, work)),
        "devices": [
            {"device": one.name, "memory GB": one.gigabytes}
            | {f"in {name}": footprint.devices(one, work, each) for name, each in (("bfloat16", 2), ("8 bit", 1))}
            for one in DEVICES
        ],
    }


def _captures(footprint: Footprint, work: Work) -> Iterable[dict[str, Any]]:
    for name in CAPTURES:
        of_batch = {"rows": work.batch, "width": work.tokens}
        last, every = (footprint.captured(name, kept=kept, **of_batch) / GB for kept in (1, work.tokens))
        yield {"capture": name, "GB per batch, last position": last, "all positions": every}


def _runs(footprint: Footprint, work: Work) -> Iterable[dict[str, Any]]:
    resumed, whole = footprint.sweep_passes()
    once = footprint.pass_flops(work)
    for name, passes in (("one pass", 1.0), ("sweep, resumed", resumed), ("sweep, whole runs", float(whole))):
        yield {"run": name, "passes": passes, "petaflop": passes * once / 1e15}
