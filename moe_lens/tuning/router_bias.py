"""A trained bias: a number for each expert is added to its router logit, and nothing of the model changes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from moe_lens.architecture import MoELayer
from moe_lens.data import Batch
from moe_lens.lens.delta import weights_digest
from moe_lens.lens.interventions import LogitBias, check_interventions
from moe_lens.lens.interventions.deciding import RouterChange, decide
from moe_lens.lens.interventions.place import check_place, in_batch
from moe_lens.lens.lens import MoELens
from moe_lens.lens.positions import Positions
from moe_lens.tuning.methods import Trainable, expect_gradient
from moe_lens.tuning.slices import grouped_experts

FIELD = "added_to_logits"
"""The parameter of each router that is there while a bias is trained."""


@dataclass(frozen=True)
class TuneBias:
    """E numbers per MoE layer learn, from 0 on, which are added to the router logits: a `LogitBias` is the result.

    layers: whose routers are biased; None for all. positions: where, as interventions take it; choose it on dev data.
    """

    layers: tuple[int, ...] | None = None
    positions: Positions = "all"
    name: ClassVar[str] = "bias"

    def __post_init__(self) -> None:
        check_place(self.positions, "all")

    def facts(self) -> dict[str, object]:
        layers = None if self.layers is None else list(self.layers)
        return {"method": self.name, "layers": layers, "positions": self.positions}

    @contextmanager
    def attached(self, lens: MoELens) -> Iterator[Trainable]:
        """Inside the block each router has its bias; leaving takes them away, and `Trainable.added` still has them."""
        expect_gradient(lens.architecture)
        layers = lens.architecture.moe_layers if self.layers is None else self.layers
        sites = [lens.architecture.at(layer) for layer in layers]
        base, total = weights_digest(lens.module), sum(one.numel() for one in lens.module.parameters())
        added = AddedBias(lens, self.positions, dict(zip(layers, _registered(lens, sites), strict=True)))
        try:
            check_interventions((added.intervention(),), lens.architecture)
            with grouped_experts(lens.module, lens.architecture):
                yield Trainable(
                    names=tuple(f"{site.router}.{FIELD}" for site in sites),
                    count=len(sites) * lens.architecture.n_experts,
                    total=total,
                    changed=(),
                    fingerprint=base,
                    base=base,
                    template=lens.template.facts(),
                    added=added,
                )
        finally:
            for site in sites:
                delattr(lens.module.get_submodule(site.router), FIELD)


@dataclass(frozen=True)
class AddedBias:
    """The biases [expert] by layer while they are trained and after."""

    lens: MoELens = field(repr=False)
    positions: Positions
    biases: dict[int, nn.Parameter]

    def intervention(self) -> LogitBias:
        values = {layer: bias.detach().cpu().float().clone() for layer, bias in self.biases.items()}
        return LogitBias(values, positions=self.positions)

    @contextmanager
    def around(self, batch: Batch) -> Iterator[None]:
        """Inside the block the bare module, run on this batch, decides as it would under `intervention`."""
        handles = []
        try:
            for layer, bias in self.biases.items():
                site = self.lens.architecture.at(layer)
                router = self.lens.module.get_submodule(site.router)
                hook = partial(self._decided, site, bias, batch)
                handles.append(router.register_forward_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _decided(
        self, site: MoELayer, bias: nn.Parameter, batch: Batch, router: nn.Module, args: Any, named: Any, output: Any
    ) -> Any:
        """What the router gives with its bias, in the place of its `output`."""
        rows, width = batch.input_ids.shape
        mask = in_batch(batch, self.positions, "all").to(bias.device)
        change = RouterChange(bias=bias).per_token(rows, width, mask)
        top_k = site.observed.top_k
        return decide(site, router.forward, (args, named), change, n_tokens=rows * width, top_k=top_k)


def _registered(lens: MoELens, sites: list[MoELayer]) -> Iterator[nn.Parameter]:
    """A bias of 0 for each expert as a parameter of each of the routers, on its device."""
    for site in sites:
        router = lens.module.get_submodule(site.router)
        device = next(router.parameters()).device
        bias = nn.Parameter(torch.zeros(lens.architecture.n_experts, device=device), requires_grad=False)
        router.register_parameter(FIELD, bias)
        yield bias
