"""Rows: another intervention for each row of a batch, or each example of a data set."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moe_lens.architecture import MoEArchitecture
from moe_lens.errors import MoELensError
from moe_lens.lens.devices import OnDevices
from moe_lens.lens.interventions.protocol import Intervention, OnExperts
from moe_lens.routing import Routing


@dataclass(frozen=True, eq=False, repr=False)
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
        for intervention, own in self._groups:
            edited = intervention(layer, Routing(own.of(logits), own.of(indices), own.of(weights)))
            rows = own.on(logits.device)
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
        return [intervention for intervention, _ in self._groups]

    @cached_property
    def _groups(self) -> list[tuple[Intervention, OnDevices]]:
        """Each different intervention with its rows, int64 [row]; one of the user's own is equal to itself only."""
        found: dict[object, tuple[Intervention, list[int]]] = {}
        for row, own in enumerate(self.interventions):
            if own is not None:
                key = own if isinstance(own, OnExperts) else id(own)
                found.setdefault(key, (own, []))[1].append(row)
        return [(own, OnDevices(torch.tensor(rows))) for own, rows in found.values()]

    def __repr__(self) -> str:
        return f"Rows({len(self.interventions)} rows, {len(self._distinct())} different interventions)"
