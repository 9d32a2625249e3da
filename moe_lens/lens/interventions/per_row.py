"""Rows: another intervention for each row of a batch, or each example of a data set."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from moe_lens.architecture import MoEArchitecture
from moe_lens.data import Batch
from moe_lens.errors import MoELensError
from moe_lens.lens.devices import on_device
from moe_lens.lens.interventions.deciding import RouterChange
from moe_lens.lens.interventions.digests import held
from moe_lens.lens.interventions.layer_values import Site, where
from moe_lens.lens.interventions.place import Here
from moe_lens.lens.interventions.protocol import Intervention, OnGating, Placed, Transplant, acts_in, chosen
from moe_lens.routing import Routing


@dataclass(frozen=True, eq=False, repr=False)
class Rows(Intervention):
    """A different intervention, or None, for each row of a batch or each example of a data set."""

    interventions: tuple[Intervention | None, ...]
    by_row: ClassVar[bool] = True

    @property
    def layers(self) -> tuple[int, ...] | None:  # type: ignore[override]  # follows from the rows
        several = [own.layers for own, _ in self._rows_of.values()]
        return None if None in several else tuple(sorted({layer for layers in several for layer in layers or ()}))

    def layers_in(self, architecture: MoEArchitecture) -> Collection[int]:
        return {layer for own in self._distinct() for layer in own.layers_in(architecture)}

    @cached_property
    def routes(self) -> bool:
        return any(own.routes for own in self._distinct())

    @cached_property
    def selects(self) -> bool:
        return any(own.selects for own in self._distinct())

    @cached_property
    def replaces_routers(self) -> bool:
        return any(own.replaces_routers for own in self._distinct())

    @cached_property
    def edits(self) -> bool:
        return any(own.edits for own in self._distinct())

    @cached_property
    def lets_rows_leave(self) -> bool:
        return all(own.lets_rows_leave for own in self._distinct())

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        return tuple(dict.fromkeys(site for own in self._distinct() for site in own.sites))

    def changed(self, site: Site, here: Here, values: Tensor) -> Tensor:
        for own, rows in self._rows_of.values():
            if site in own.sites and acts_in(own, here.layer):
                values = where(self._of_rows(here, rows), own.changed(site, here, values), values)
        return values

    def asks(self, layer: int, n_experts: int) -> RouterChange:
        if all(type(own).asks is Intervention.asks for own in self._distinct()):
            return RouterChange()
        asked = [RouterChange()] * len(self.interventions)
        for own, rows in self._rows_of.values():
            change = own.asks(layer, n_experts) if acts_in(own, layer) else RouterChange()
            for row in rows:
                asked[row] = change
        return RouterChange.by_row(asked)

    def selection(self, here: Here, k: int) -> Tensor | None:
        found = None
        for own, rows in self._rows_of.values():
            selected = own.selection(here, k) if acts_in(own, here.layer) else None
            if selected is not None:
                found = selected.new_full(selected.shape, -1) if found is None else found
                found = torch.where(self._of_rows(here, rows)[..., None], selected, found)
        return found

    def transplants(self, here: Here) -> list[Transplant]:
        found = []
        for own, rows in self._rows_of.values():
            for one in own.transplants(here) if acts_in(own, here.layer) else ():
                mine = self._of_rows(here, rows)
                found.append(replace(one, where=mine if one.where is None else mine & one.where))
        return found

    def mask(self, here: Here) -> Tensor | None:
        """Where any of them acts; MoELensError unless each row has an intervention, or None."""
        if len(self.interventions) != here.rows:
            raise MoELensError(
                f"expected one intervention per row; Rows has {len(self.interventions)} for a batch of {here.rows}"
            )
        if self._everywhere:
            return None
        masks = [(own.mask(here), rows) for own, rows in self._rows_of.values()]
        if all(mask is None for mask, _ in masks):
            return None
        whole = torch.zeros(here.rows, here.width, dtype=torch.bool, device=here.device)
        for mask, rows in masks:
            whole |= self._of_rows(here, rows) if mask is None else mask & self._of_rows(here, rows)
        return whole

    def __call__(self, here: Here, routing: Routing) -> Routing:
        """`routing` with each row edited by its own intervention."""
        n_experts = routing.n_experts
        for kind, tables in here.once((id(self), "tables"), lambda: self._tables(here, n_experts)):
            if here.layer in tables:
                hits = tables[here.layer][:, None].expand(-1, here.width, -1).gather(-1, routing.indices)
                routing = kind.edited(routing, hits)
        for own, rows in self._rows_of.values():
            if not isinstance(own, OnGating) and own.edits and acts_in(own, here.layer):
                routing = routing.where(self._of_rows(here, rows), own(here, routing))
        return routing

    @property
    def no_remote(self) -> str:
        return "what differs by row is not sent; give each run one intervention"

    def expect(self, batch: Batch) -> None:
        for own, rows in self._rows_of.values():
            if max(rows) < len(batch.ids):
                own.expect(batch.of_rows(rows))

    def prepare(self, batch: Batch, rows: Sequence[int]) -> dict[int, Any]:
        prepared: dict[int, Any] = {}
        for own, mine in self._rows_of.values():
            if asked := [row for row in mine if row in rows]:
                prepared |= own.prepare(batch, asked)
        return prepared

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

    def _tables(self, here: Here, n_experts: int) -> list[tuple[OnGating, dict[int, Tensor]]]:
        """The experts whose gating is edited, by layer for each row, bool [batch, expert].

        Interventions of one class and the same settings on different experts are one here.
        """
        found: dict[Any, tuple[OnGating, dict[int, Tensor]]] = {}
        for own, rows in self._rows_of.values():
            if isinstance(own, OnGating):
                _, tables = found.setdefault(_but_experts(own) if own.is_ours() else id(own), (own, {}))
                for layer in own.experts.layers:
                    table = tables.setdefault(layer, torch.zeros(here.rows, n_experts, dtype=torch.bool))
                    table[rows] = chosen(own.experts[layer], n_experts)
        return [
            (own, dict(zip(tables, on_device(tables.values(), here.device), strict=True)))
            for own, tables in found.values()
        ]

    def _of_rows(self, here: Here, rows: Sequence[int]) -> Tensor:
        """Which rows of the batch these are, bool [batch, 1]."""
        return here.once((id(self), "rows", tuple(rows)), lambda: chosen(rows, here.rows)[:, None].to(here.device))

    @cached_property
    def _everywhere(self) -> bool:
        """Whether all of them are of kinds that act wherever they are said to, and everywhere."""
        plain = [own for own in self._distinct() if type(own).mask is Intervention.mask]
        return all(own.positions == own.steps == "all" for own in plain) and len(plain) == len(self._distinct())

    def _distinct(self) -> list[Intervention]:
        return [intervention for intervention, _ in self._rows_of.values()]

    @cached_property
    def _rows_of(self) -> dict[object, tuple[Intervention, list[int]]]:
        """Each different intervention with its rows; one of the user's own is equal to itself only."""
        found: dict[object, tuple[Intervention, list[int]]] = {}
        for row, own in enumerate(self.interventions):
            if own is not None:
                key = own if isinstance(own, Placed) else id(own)
                found.setdefault(key, (own, []))[1].append(row)
        return found

    def __repr__(self) -> str:
        return f"Rows({len(self.interventions)} rows, {len(self._distinct())} different interventions)"


def _but_experts(own: OnGating) -> Any:
    """What interventions on different experts may share: the class and all other settings."""
    return type(own), *(value for name, value in held(own).items() if name not in ("experts", "layers"))
