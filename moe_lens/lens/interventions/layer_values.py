"""What of a layer can be replaced while the model runs, besides its routing: SITES, by name."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lens.architecture import MoEArchitecture, MoELayer, Moment
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens.reader import TraceReader


@dataclass(frozen=True)
class Access:
    """How something of a layer is read and replaced in a running model.

    about: what it is. of_experts: whether only layers with experts have it. read_at, write_at: the moments; one that
        depends on the model is a function of its layer. read: gives it, [batch, pos, d_model]. write: puts the last in
        the place of the one before. lacks: why a layer has none; empty where it has.
    """

    about: str
    of_experts: bool
    read_at: Moment | Callable[[MoELayer], Moment]
    write_at: Moment
    read: Callable[[TraceReader, int, Sequence[int] | None], Tensor]
    write: Callable[[TraceReader, int, Tensor, Tensor], None]
    lacks: Callable[[MoELayer], str] = lambda layer: ""


SITES: Mapping[str, Access] = {
    "residual": Access(
        "the residual stream after the layer",
        False,
        Moment.LAYER_OUTPUT,
        Moment.LAYER_OUTPUT,
        lambda reader, layer, experts: reader.layer_output(layer),
        lambda reader, layer, old, new: reader.set_layer_output(layer, new),
    ),
    "moe_output": Access(
        "what the MoE block gives, routed and shared experts together",
        True,
        Moment.BLOCK_OUTPUT,
        Moment.BLOCK_OUTPUT,
        lambda reader, layer, experts: reader.moe_output(layer),
        lambda reader, layer, old, new: reader.set_moe_output(layer, new),
    ),
    "shared_output": Access(
        "what the shared experts add to the block's output",
        True,
        lambda layer: layer.shared_moment,
        Moment.BLOCK_OUTPUT,
        lambda reader, layer, experts: reader.shared_output(layer),
        lambda reader, layer, old, new: reader.set_moe_output(layer, reader.moe_output(layer) + (new - old)),
        lambda layer: layer.no_shared_output,
    ),
    "expert_outputs": Access(
        "what experts add to the sum of all: gating weight times output, over those of a set that the token selects",
        True,
        Moment.SINGLE_OUTPUTS,
        Moment.AFTER_EXPERTS,
        lambda reader, layer, experts: reader.contribution(layer, experts),
        lambda reader, layer, old, new: reader.add_to_routed(layer, new - old),
        lambda layer: layer.no_single_outputs and f"cannot tell single outputs: {layer.no_single_outputs}",
    ),
    "router_input": Access(
        "what the router is given of each token",
        True,
        Moment.ROUTER_INPUT,
        Moment.ROUTER_INPUT,
        lambda reader, layer, experts: reader.router_input(layer),
        lambda reader, layer, old, new: reader.set_router_input(layer, new),
    ),
}
"""All that interventions can replace, by name."""


def where(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` where `mask`, bool [batch, pos] or [batch, 1], is True, else `old`; both [batch, pos, ..., d_model]."""
    return torch.where(mask.view(*mask.shape, *[1] * (old.ndim - 2)), new, old)


@dataclass(frozen=True)
class Site:
    """One of `SITES` in a layer, of all experts or, for "expert_outputs", of some. MoELensError for another name."""

    name: str
    experts: ExpertSet | None = None

    def __post_init__(self) -> None:
        if self.name not in SITES:
            raise MoELensError(f"what is changed must be one of {', '.join(SITES)}; got {self.name!r}")
        if self.experts is not None and self.name != "expert_outputs":
            raise MoELensError(f"experts= is for 'expert_outputs' alone; got {self.name!r}")

    @property
    def access(self) -> Access:
        """How it is read and replaced."""
        return SITES[self.name]

    def chosen(self, layer: int) -> tuple[int, ...] | None:
        """The experts of a layer whose values are meant; None for all."""
        return None if self.experts is None else self.experts[layer]

    @property
    def of_experts(self) -> bool:
        """Whether only layers with experts have it."""
        return self.access.of_experts

    def check(self, architecture: MoEArchitecture, layers: Collection[int] | None) -> None:
        """MoELensError, naming it, for a layer that has none of this; layers: None for all."""
        for layer in architecture.moe_layers if layers is None else layers:
            lacks = self.of_experts and self.access.lacks(architecture.at(layer))
            if lacks:
                raise MoELensError(f"no {self.name!r} can be changed: layer {layer} {lacks}")
