"""Interventions on routing: Zero, Renormalize and Reroute, alike for all or different per row of a batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moe_lens.architecture import MoEArchitecture
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet, expect_experts
from moe_lens.routing import Routing


class Intervention:
    """A change of routing: `excluded` experts cannot be selected, then the call edits what was decided."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers this intervention acts on, in rising order."""
        raise NotImplementedError

    def __call__(self, layer: int, routing: Routing) -> Routing:
        """The routing that the experts of `layer` get instead of `routing`."""
        raise NotImplementedError

    def excluded(self, layer: int, n_experts: int) -> Tensor:
        """Experts of `layer` removed before the top-k, bool [expert] or [batch, expert]."""
        return torch.zeros(n_experts, dtype=torch.bool)

    def take(self, rows: Sequence[int]) -> "Intervention":
        """The intervention for a batch made of these rows; the same for all rows unless it is `Rows`."""
        return self

    def check(self, architecture: MoEArchitecture) -> None:
        """MoELensError unless the model has the layers and experts acted on."""
        raise NotImplementedError


@dataclass(frozen=True)
class _OnExperts(Intervention):
    """An intervention on one set of experts, the same for every row and position."""

    experts: ExpertSet
    mode: ClassVar[str]

    def __post_init__(self) -> None:
        expect_experts(self.experts)

    @property
    def layers(self) -> tuple[int, ...]:
        return self.experts.layers

    def check(self, architecture: MoEArchitecture) -> None:
        for layer in self.layers:
            architecture.at(layer)
            unknown = [expert for expert in self.experts[layer] if expert >= architecture.n_experts]
            if unknown:
                raise MoELensError(
                    f"layer {layer} has experts 0 to {architecture.n_experts - 1}; got {unknown} in '{self.experts}'"
                )

    def _hits(self, layer: int, indices: Tensor) -> Tensor:
        """Which selected experts are in the set, bool [batch, pos, k]."""
        return torch.isin(indices, torch.tensor(self.experts[layer], dtype=indices.dtype, device=indices.device))


@dataclass(frozen=True)
class Zero(_OnExperts):
    """Gating weight -> 0, nothing else: the paper's masking. Equal to a `down_proj` of zeros, bit for bit."""

    mode: ClassVar[str] = "zero"

    def __call__(self, layer: int, routing: Routing) -> Routing:
        return replace(routing, weights=routing.weights.masked_fill(self._hits(layer, routing.indices), 0))


@dataclass(frozen=True)
class Renormalize(_OnExperts):
    """Gating weight -> 0, then a token's other weights rescaled to the old sum; all 0 where no other is left.

    w'_i = w_i [i not in set] * sum_j w_j / sum_{j not in set} w_j
    """

    mode: ClassVar[str] = "renormalize"

    def __call__(self, layer: int, routing: Routing) -> Routing:
        rest = routing.weights.masked_fill(self._hits(layer, routing.indices), 0)
        left = rest.sum(-1, keepdim=True)
        factor = routing.weights.sum(-1, keepdim=True) / left.masked_fill(left == 0, 1)
        return replace(routing, weights=rest * factor)


@dataclass(frozen=True)
class Reroute(_OnExperts):
    """Removed before the top-k, so that the next expert steps in. Equal to physically deleting the experts.

    What the paper's released code does, where its text describes `Zero`.
    """

    mode: ClassVar[str] = "reroute"

    def __call__(self, layer: int, routing: Routing) -> Routing:
        return routing  # the router chose without the experts already

    def excluded(self, layer: int, n_experts: int) -> Tensor:
        mask = torch.zeros(n_experts, dtype=torch.bool)
        mask[list(self.experts[layer])] = True
        return mask


@dataclass(frozen=True)
class Rows(Intervention):
    """A different intervention, or None, for each row of a batch or each example of a data set."""

    interventions: tuple[Intervention | None, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for row in self._distinct() for layer in row.layers}))

    def __call__(self, layer: int, routing: Routing) -> Routing:
        """`routing` with each row edited by its own intervention; MoELensError unless each row has one."""
        if len(self.interventions) != len(routing.indices):
            raise MoELensError(
                f"expected one intervention per row; Rows has {len(self.interventions)} for a batch of "
                f"{len(routing.indices)}"
            )
        logits, indices, weights = routing.logits.clone(), routing.indices.clone(), routing.weights.clone()
        for intervention in self._distinct():
            rows = [i for i, own in enumerate(self.interventions) if own == intervention]
            edited = intervention(layer, Routing(logits[rows], indices[rows], weights[rows]))
            logits[rows], indices[rows], weights[rows] = edited.logits, edited.indices, edited.weights
        return Routing(logits, indices, weights)

    def excluded(self, layer: int, n_experts: int) -> Tensor:
        none = torch.zeros(n_experts, dtype=torch.bool)
        return torch.stack([none if own is None else own.excluded(layer, n_experts) for own in self.interventions])

    def take(self, rows: Sequence[int]) -> "Rows":
        if max(rows, default=-1) >= len(self.interventions):
            raise MoELensError(
                f"Rows has {len(self.interventions)} interventions but the data has more examples; "
                "expected one per example"
            )
        return Rows(tuple(self.interventions[row] for row in rows))

    def check(self, architecture: MoEArchitecture) -> None:
        for intervention in self._distinct():
            intervention.check(architecture)

    def _distinct(self) -> list[Intervention]:
        return list(dict.fromkeys(own for own in self.interventions if own is not None))


CHOICES = ("topk", "max", "argmax")
"""The functions by which routers choose."""

MODES: dict[str, Callable[[ExpertSet], Intervention]] = {kind.mode: kind for kind in (Zero, Renormalize, Reroute)}
"""The interventions on an `ExpertSet`, by name."""


def excluded_by(interventions: Sequence[Intervention], layer: int, n_experts: int) -> Tensor | None:
    """What these remove before `layer`'s top-k, bool [expert] or [batch, expert]; None if nothing."""
    masks = [own.excluded(layer, n_experts) for own in interventions if layer in own.layers]
    together = torch.stack(torch.broadcast_tensors(*masks)).any(0) if masks else None
    return together if together is not None and together.any() else None


def check_interventions(interventions: Sequence[Intervention], architecture: MoEArchitecture) -> None:
    """MoELensError unless the model has their layers and experts, and enough experts without excluded ones.

    With group-limited routing a token may be sent to the groups with the fewest experts left, so those have
    to suffice.
    """
    for intervention in interventions:
        intervention.check(architecture)
    groups, chosen = architecture.groups or (1, 1)
    for layer in architecture.moe_layers:
        excluded = excluded_by(interventions, layer, architecture.n_experts)
        if excluded is None:
            continue
        if architecture.at(layer).observed.chooses_by_token:
            raise MoELensError(
                f"layer {layer} selects experts by a fixed table of token ids, so there is no next expert to reroute "
                "to; use Zero or Renormalize there"
            )
        per_group = (~excluded).reshape(-1, groups, architecture.n_experts // groups).sum(-1)  # [batch, group]
        fewest = int(per_group.sort(-1).values[:, :chosen].sum(-1).min())
        if fewest < architecture.top_k:
            where = f" in some {chosen} of its {groups} groups" if architecture.groups else ""
            raise MoELensError(
                f"rerouting in layer {layer} leaves {fewest} experts{where}, fewer than the "
                f"{architecture.top_k} that each token needs; remove fewer experts, or use Zero"
            )


class WithoutExperts(TorchFunctionMode):
    """A router called inside this block decides as if there were no `excluded` experts, bool [token, expert].

    Both the logits and the operand of each top-k over all experts become -inf there. The logits alone would
    not do: where a selection bias is added to bounded scores, an expert with logit -inf can still be chosen,
    with weight 0. The top-k alone would not do either: softmax over all experts would still count it.
    """

    def __init__(self, excluded: Tensor, *, map_width: int) -> None:
        """map_width: outputs of the router's linear map; those beyond the experts, of shared ones, are kept."""
        super().__init__()
        self._excluded = excluded
        self._map_width = map_width
        self._masked: set[str] = set()

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in CHOICES and args[0].numel() == self._excluded.numel():  # also per group: [token, group, expert]
            self._masked.add("choice")
            args = (args[0].masked_fill(self._excluded.view(args[0].shape), -torch.inf), *args[1:])
        output = function(*args, **(kwargs or {}))
        if name == "linear" and output.shape[-1] == self._map_width:
            self._masked.add("logits")
            others = self._map_width - self._excluded.shape[-1]
            excluded = F.pad(self._excluded, (0, others))
            return output.masked_fill(excluded.view(output.shape), -torch.inf)
        return output

    def check(self, router: str, *, chooses: bool) -> None:
        """MoELensError unless logits and choice were both seen, so that nothing was rerouted in name only.

        chooses: whether the router itself chooses, or the block around it by the logits.
        """
        needed = {"logits", "choice"} if chooses else {"logits"}
        if not self._masked >= needed:
            raise MoELensError(
                f"cannot reroute {router!r}: expected it to make logits by a linear map and choose by top-k, "
                f"saw {sorted(self._masked) or 'neither'}; use Zero or Renormalize"
            )
