"""Reroute, Force, Bias and TopK: the router is asked to select otherwise."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moe_lens.architecture import MoEArchitecture
from moe_lens.errors import MoELensError
from moe_lens.lens.interventions.deciding import RouterChange
from moe_lens.lens.interventions.protocol import OnExperts, Placed, chosen


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
        keeps_sum = torch.tensor([True]) if self.weights == "sum" else None
        return RouterChange(forced=chosen(self.experts[layer], n_experts), keeps_sum=keeps_sum)


@dataclass(frozen=True, eq=False, repr=False)
class Bias(OnExperts):
    """Adds a number to the router logits of experts, before the router's own scoring and selection.

    So the experts are selected more often (or less, below 0) and get more weight: a dose. 0 changes nothing. It does
    not exclude: where a selection bias or bounded scores decide, an expert can be selected at any logit.

    alpha: finite, in logits; where `sd` is given, by layer, in these standard deviations of a token's logits, which
    `LogitSpread` of moe_lens.statistics measures.
    weights: "router" for weights of the biased logits, or "unbiased" for a selection that is biased alone.
    """

    alpha: float
    sd: Mapping[int, float] | tuple[tuple[int, float], ...] | None = None
    weights: Literal["router", "unbiased"] = "router"
    mode: ClassVar[str] = "bias"

    def __post_init__(self) -> None:
        if not math.isfinite(self.alpha):
            raise MoELensError(
                f"a bias must be a finite number, since -inf excludes nothing; got {self.alpha}; use Reroute"
            )
        expect_bias_weights(self.weights)
        object.__setattr__(self, "alpha", float(self.alpha))
        super().__post_init__()
        if self.sd is None:
            return
        given = dict(self.sd)
        wrong = [layer for layer in self.experts.layers if not 0 < given.get(layer, 0) < math.inf]
        if wrong:
            raise MoELensError(f"sd needs a finite standard deviation above 0 of the logits of layers {wrong}")
        object.__setattr__(self, "sd", tuple((layer, float(given[layer])) for layer in self.experts.layers))

    def __repr__(self) -> str:
        unit = "" if self.sd is None else " sd"
        return f"Bias({self.experts.brief()}, {self.alpha:g}{unit}{self.where()})"

    def asks(self, layer: int, n_experts: int) -> RouterChange:
        size = self.alpha * (1.0 if self.sd is None else dict(self.sd)[layer])
        added = chosen(self.experts[layer], n_experts) * size
        return RouterChange(bias=added) if self.weights == "router" else RouterChange(selection_bias=added)

    def scaled(self, factor: float) -> "Bias":
        return replace(self, alpha=factor * self.alpha)


@dataclass(frozen=True, eq=False, repr=False)
class LogitBias(Placed):
    """Adds a number of its own to each router logit: `Bias` with tensors [expert] by layer."""

    biases: Mapping[int, Tensor]
    weights: Literal["router", "unbiased"] = "router"

    def __post_init__(self) -> None:
        expect_bias_weights(self.weights)
        own = tuple(sorted(self.biases))
        if self.layers not in (None, own) or not own:
            raise MoELensError(
                "LogitBias takes tensors by layer, one or more, which name its layers; leave layers= out"
            )
        if not all(bias.ndim == 1 and bias.isfinite().all() for bias in self.biases.values()):
            raise MoELensError(f"expected a finite tensor [expert] for each of the layers {list(own)}")
        object.__setattr__(self, "layers", own)
        super().__post_init__()

    def asks(self, layer: int, n_experts: int) -> RouterChange:
        added = self.biases[layer].detach().cpu().float()
        return RouterChange(bias=added) if self.weights == "router" else RouterChange(selection_bias=added)

    def scaled(self, factor: float) -> "LogitBias":
        return replace(self, biases={layer: factor * bias for layer, bias in self.biases.items()})

    def check(self, architecture: MoEArchitecture) -> None:
        super().check(architecture)
        wrong = [layer for layer, bias in self.biases.items() if len(bias) != architecture.n_experts]
        if wrong:
            raise MoELensError(f"expected {architecture.n_experts} biases in each layer, one for each; not in {wrong}")


def expect_bias_weights(weights: str) -> None:
    """MoELensError unless it says which weights a bias gives."""
    if weights not in ("router", "unbiased"):
        raise MoELensError(f"weights under a bias must be 'router' or 'unbiased'; got {weights!r}")


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
        groups, taken = architecture.groups or (1, 1)
        if self.k > taken * architecture.n_experts // groups:
            raise MoELensError(
                f"a token may choose {taken} of {groups} groups of {architecture.n_experts // groups} experts; "
                f"expected k of at most as many as these have; got {self.k}"
            )
        for layer in architecture.moe_layers if self.layers is None else self.layers:
            site = architecture.at(layer)
            few = f"its experts need {site.slots_per_call} or more" if self.k < site.slots_per_call else ""
            fixed = site.fixed_k or site.fixed_selection or few
            if fixed and self.k != architecture.top_k:
                raise MoELensError(
                    f"a token of layer {layer} cannot get {self.k} instead of {architecture.top_k} experts: {fixed}"
                )
