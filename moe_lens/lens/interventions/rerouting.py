"""Reroute, Force, Bias and TopK: the router is asked to select otherwise."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from moe_lens.architecture import MoEArchitecture
from moe_lens.errors import MoELensError
from moe_lens.lens.interventions.deciding import RouterChange
from moe_lens.lens.interventions.place import Here
from moe_lens.lens.interventions.protocol import OnExperts, Placed, chosen
from moe_lens.routing import Routing


@dataclass(frozen=True, eq=False, repr=False)
class Reroute(OnExperts):
    """Removes experts before the top-k, so that the next expert steps in. Equal to physically deleting them.

    What the paper's released code does, where its text describes `Zero`.
    """

    mode: ClassVar[str] = "reroute"

    def asks(self, layer: int, n_experts: int) -> RouterChange:
        return RouterChange(excluded=chosen(self.experts[layer], n_experts))


@dataclass(frozen=True, eq=False, repr=False)
class Force(OnExperts):
    """Makes experts always be among the selected, in the place of the lowest others; k stays as it is.

    weights: "router" for those that the router's own rule gives them, or "sum" for these rescaled to the sum that the
    token's weights have without the intervention.
    """

    weights: Literal["router", "sum"] = "router"
    mode: ClassVar[str] = "force"

    def __post_init__(self) -> None:
        if self.weights not in ("router", "sum"):
            raise MoELensError(f"weights of forced experts must be 'router' or 'sum'; got {self.weights!r}")
        super().__post_init__()

    def asks(self, layer: int, n_experts: int) -> RouterChange:
        return RouterChange(forced=chosen(self.experts[layer], n_experts))

    @property
    def compares(self) -> bool:
        return self.weights == "sum"

    def __call__(self, here: Here, routing: Routing) -> Routing:
        if here.before is None or here.decided is None or not self.compares:
            return routing
        old, new = (found.weights.sum(-1, keepdim=True) for found in (here.before, here.decided))
        return replace(routing, weights=routing.weights * (old / new))


@dataclass(frozen=True, eq=False, repr=False)
class Bias(OnExperts):
    """Adds a number to the router logits of experts, before the router's own scoring and selection.

    So the experts are selected more often (or less, below 0) and get more weight: a dose. 0 changes nothing. It does
    not exclude: where a selection bias or bounded scores decide, an expert can be selected at any logit.

    alpha: finite, in logits; where `sd` is given, in standard deviations of each layer's logits (see `logit_sd`).
    weights: "router" for weights of the biased logits, or "unbiased" for a selection that is biased alone.
    """

    alpha: float
    sd: tuple[tuple[int, float], ...] | None = None
    weights: Literal["router", "unbiased"] = "router"
    mode: ClassVar[str] = "bias"

    def __post_init__(self) -> None:
        if not math.isfinite(self.alpha):
            raise MoELensError(
                f"a bias must be a finite number, since -inf excludes nothing; got {self.alpha}; use Reroute"
            )
        if self.weights not in ("router", "unbiased"):
            raise MoELensError(f"weights under a bias must be 'router' or 'unbiased'; got {self.weights!r}")
        super().__post_init__()
        missing = set(self.experts.layers) - {layer for layer, _ in self.sd or ()}
        if self.sd is not None and missing:
            raise MoELensError(f"sd has no standard deviation of the logits of layers {sorted(missing)}")

    def __repr__(self) -> str:
        unit = "" if self.sd is None else " sd"
        return f"Bias({self.experts.brief()}, {self.alpha:g}{unit}{self.where()})"

    def asks(self, layer: int, n_experts: int) -> RouterChange:
        size = self.alpha * (1.0 if self.sd is None else dict(self.sd)[layer])
        added = chosen(self.experts[layer], n_experts) * size
        return RouterChange(bias=added) if self.weights == "router" else RouterChange(selection_bias=added)


@dataclass(frozen=True, eq=False, repr=False)
class TopK(Placed):
    """Makes the router select another number of experts for each token; their weights follow by its own rule."""

    k: int

    def __post_init__(self) -> None:
        if type(self.k) is not int or self.k < 1:
            raise MoELensError(f"a token needs one expert or more; got k={self.k!r}")
        super().__post_init__()

    def asks(self, layer: int, n_experts: int) -> RouterChange:
        return RouterChange(top_k=torch.tensor([self.k]))

    def check(self, architecture: MoEArchitecture) -> None:
        super().check(architecture)
        if self.k > architecture.n_experts:
            raise MoELensError(f"expected k of at most {architecture.n_experts}, all experts; got {self.k}")
        for layer in architecture.moe_layers if self.layers is None else self.layers:
            site = architecture.at(layer)
            fixed = site.fixed_k or (self.k < site.slots_per_call and f"its experts need {site.slots_per_call} or more")
            if fixed and self.k != architecture.top_k:
                raise MoELensError(
                    f"a token of layer {layer} cannot get {self.k} instead of {architecture.top_k} experts: {fixed}"
                )
