"""What every intervention is: a change of routing, told from others by what it holds; and the check of several."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from moe_lens.architecture import MoEArchitecture
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet, expect_experts
from moe_lens.lens.interventions.digests import digest_of, held
from moe_lens.routing import Routing


class Intervention:
    """A change of routing: `excluded` experts cannot be selected, then the call edits what was decided.

    A subclass is a dataclass, `@dataclass(frozen=True, eq=False, repr=False)`, of settings, tensors and other
    interventions: `digest`, equality and a short repr follow from these, and from the subclass's own code.
    """

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers this intervention acts on, in rising order."""
        raise NotImplementedError

    def __call__(self, layer: int, routing: Routing) -> Routing:
        """The routing that the experts of `layer` get instead of `routing`."""
        raise NotImplementedError

    def excluded(self, layer: int, n_experts: int) -> Tensor:
        """Experts of `layer` removed before the top-k, bool [expert] or [batch, expert], on the CPU."""
        return torch.zeros(n_experts, dtype=torch.bool)

    def take(self, rows: Sequence[int]) -> "Intervention":
        """The intervention for a batch made of these rows; the same for all rows unless it is `Rows`."""
        return self

    def check(self, architecture: MoEArchitecture) -> None:
        """MoELensError unless the model has the layers and experts acted on."""
        raise NotImplementedError

    @property
    def digest(self) -> str:
        """What tells an intervention from others, also in kept results: see `digest_of`, which also says its errors."""
        return digest_of(self)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Intervention) and self.digest == other.digest)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={_brief(value)}' for name, value in held(self).items())})"


@dataclass(frozen=True, eq=False, repr=False)
class OnExperts(Intervention):
    """An intervention on one set of experts, the same for every row and position."""

    experts: ExpertSet
    mode: ClassVar[str]

    def __post_init__(self) -> None:
        expect_experts(self.experts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.experts.brief()})"

    @property
    def digest(self) -> str:
        """As every intervention's; remembered where this package's code and experts alone, which stay, make it."""
        stays = type(self).__module__.startswith(__package__) and vars(self).keys() == {"experts"}
        if not stays:
            return digest_of(self)
        return _of_experts(type(self), self.experts)  # type: ignore[arg-type]  # a class is hashable

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

    def hits(self, layer: int, routing: Routing) -> Tensor:
        """Which selected experts are in the set, bool [batch, pos, k]."""
        return _member_table(self.experts[layer], routing.n_experts, routing.indices.device)[routing.indices]


@lru_cache(maxsize=4_096)
def _member_table(experts: tuple[int, ...], n_experts: int, device: torch.device) -> Tensor:
    """Which experts of a layer are among `experts`, bool [expert]; made once, not at every layer and step."""
    table = torch.zeros(n_experts, dtype=torch.bool)
    table[list(experts)] = True
    return table.to(device)


@lru_cache(maxsize=65_536)
def _of_experts(kind: Callable[[ExpertSet], OnExperts], experts: ExpertSet) -> str:
    return digest_of(kind(experts))


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
        _expect_intervention(intervention)
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


def _expect_intervention(value: object) -> None:
    """MoELensError unless it is an intervention."""
    if isinstance(value, ExpertSet):
        raise MoELensError(
            f"got experts, {value.brief()}, without what to do to them; give an intervention such as Zero(experts), "
            "Renormalize(experts) or Reroute(experts)"
        )
    if not isinstance(value, Intervention):
        raise MoELensError(f"expected an intervention such as Zero(experts); got {value!r:.80}")


def _brief(value: object) -> str:
    """A value in a few words: a tensor's dtype and shape, the beginning of what is long."""
    text = f"{value.dtype} {list(value.shape)}".removeprefix("torch.") if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
