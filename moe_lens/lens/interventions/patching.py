"""Patch, SetTo and Replay: values, or the routing, of another run take the place of this one's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from moe_lens.architecture import MoEArchitecture
from moe_lens.data import Batch
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens.interventions.directions import OnActivations, expect_width
from moe_lens.lens.interventions.layer_values import Site
from moe_lens.lens.interventions.place import Here, in_batch
from moe_lens.lens.interventions.protocol import Placed
from moe_lens.lens.interventions.sources import Run, Source, values_at
from moe_lens.lens.positions import steps_of
from moe_lens.lens.record import Record
from moe_lens.routing import Routing

Align = Literal["exact", "start", "end"]
OTHER_RUN = "it takes what another run gave, which is looked up here"


@dataclass(frozen=True, eq=False)
class Matched:
    """What of a batch gets values of another run, and these values.

    where: bool [batch, pos]. values: by layer, [place, ...], for the places that are True, row by row.
    """

    where: Tensor
    values: Mapping[int, tuple[Tensor, ...]]

    def spread(self, layer: int, part: int, fill: float, device: torch.device) -> Tensor:
        """A part of a layer's values at their positions, [batch, pos, ...], `fill` elsewhere."""
        values = self.values[layer][part]
        whole = values.new_full((*self.where.shape, *values.shape[1:]), fill)
        whole[self.where.to(values.device)] = values
        return whole.to(device)


@dataclass(frozen=True, eq=False, repr=False)
class Patch(OnActivations):
    """Puts what another run has, at one of `SITES`, in the place of this run's: activation patching.

    source: the other run, on examples of the same ids. For denoising, this run is the corrupted one and the source the
        clean one; for noising, the other way round.
    what: "residual", "moe_output", "shared_output", "router_input"; or "expert_outputs", what the experts of `experts`
        (all by default) add to the sum of all: then the difference of the two runs is added.
    positions: the same word is taken in both runs, and the i-th such position here gets the i-th there. Where they are
        not equally many: "exact" refuses it, naming the example; "start" and "end" match the first or last ones.
    steps: the prompt is patched; appended answers too where the source has them.
    """

    source: Run
    experts: ExpertSet | None = field(default=None, kw_only=True)
    align: Align = field(default="exact", kw_only=True)

    def __post_init__(self) -> None:
        expect_align(self.align)
        if self.experts is not None and self.layers is None:
            object.__setattr__(self, "layers", self.experts.layers)
        super().__post_init__()
        Site(self.what, self.experts)

    @property
    def sites(self) -> tuple[Site, ...]:
        return (Site(self.what, self.experts),)

    @property
    def no_remote(self) -> str:
        return OTHER_RUN

    def prepare(self, batch: Batch, rows: Sequence[int]) -> dict[int, Any]:
        [site] = self.sites
        captures = ("routing", "expert_outputs") if site.name == "expert_outputs" else (site.name,)
        records = self.source.records(batch.of_rows(rows), captures, self.positions)
        first = records[0].captured[captures[-1]]
        layers = tuple(first) if self.layers is None else tuple(self.layers)

        def read(record: Record, layer: int) -> tuple[Tensor, ...]:
            return (values_at(record, site, layer),)

        return {id(self): matched(self, batch, rows, records, layers, read)}

    def mask(self, here: Here) -> Tensor | None:
        return matched_mask(self, here)

    def changed(self, site: Site, here: Here, values: Tensor) -> Tensor:
        if here.past >= here.prompt:
            return values
        found: Matched = here.prepared[id(self)]
        whole = here.once((id(self), here.layer), lambda: found.spread(here.layer, 0, 0.0, here.device).to(values))
        return whole[:, here.past : here.past + here.width]


@dataclass(frozen=True, eq=False, repr=False)
class SetTo(OnActivations):
    """Puts given vectors [d_model] by layer in the place of the values: mean ablation, with means over other examples.

    `mean_values` gives such vectors; zeros give zero ablation.
    """

    vectors: Mapping[int, Tensor]

    def __post_init__(self) -> None:
        own = tuple(sorted(self.vectors))
        if self.layers not in (None, own) or not own:
            raise MoELensError("SetTo takes vectors by layer, one or more, which name its layers; leave layers= out")
        object.__setattr__(self, "layers", own)
        super().__post_init__()

    def changed(self, site: Site, here: Here, values: Tensor) -> Tensor:
        vector = here.once((id(self), here.layer), lambda: self.vectors[here.layer].detach().to(values))
        return vector.expand(values.shape)

    def check(self, architecture: MoEArchitecture) -> None:
        super().check(architecture)
        for vector in self.vectors.values():
            expect_width(vector, architecture)


@dataclass(frozen=True, eq=False, repr=False)
class Replay(Placed):
    """Makes the router select what it selects in another run, at each position; elsewhere it decides.

    source: the other run, on examples of the same ids: of this model under interventions, of a tuned one, on other
    contexts; or a `TraceRun` of moe_lens.traces, what a serving engine selected. weights: "router" for those that this
    run's logits give the replayed experts, "source" for the other's.
    align, positions, steps: as in `Patch`.
    """

    source: Source
    weights: Literal["router", "source"] = "router"
    align: Align = field(default="exact", kw_only=True)

    def __post_init__(self) -> None:
        expect_align(self.align)
        if self.weights not in ("router", "source"):
            raise MoELensError(f"weights of a replay must be 'router' or 'source'; got {self.weights!r}")
        super().__post_init__()

    @property
    def no_remote(self) -> str:
        return OTHER_RUN

    def prepare(self, batch: Batch, rows: Sequence[int]) -> dict[int, Any]:
        records = self.source.records(batch.of_rows(rows), ("routing",), self.positions)
        layers = tuple(records[0].routing) if self.layers is None else tuple(self.layers)

        def read(record: Record, layer: int) -> tuple[Tensor, ...]:
            routing, kept = record.routing[layer], record.kept.to(record.routing[layer].indices.device)
            parts = (routing.indices, *([routing.weights] if self.weights == "source" else []))
            return tuple(part.index_select(1, kept) for part in parts)

        return {id(self): matched(self, batch, rows, records, layers, read)}

    def selection(self, here: Here, k: int) -> Tensor | None:
        if here.past >= here.prompt:
            return None
        found: Matched = here.prepared[id(self)]
        whole = here.once((id(self), here.layer, "experts"), lambda: found.spread(here.layer, 0, -1, here.device))
        if whole.shape[-1] != k:
            raise MoELensError(f"the run that is replayed selects {whole.shape[-1]} experts per token, this one {k}")
        return whole[:, here.past : here.past + here.width]

    def mask(self, here: Here) -> Tensor | None:
        return matched_mask(self, here)

    def __call__(self, here: Here, routing: Routing) -> Routing:
        if self.weights == "router" or here.past >= here.prompt:
            return routing
        found: Matched = here.prepared[id(self)]
        whole = here.once((id(self), here.layer, "weights"), lambda: found.spread(here.layer, 1, 0.0, here.device))
        weights = whole[:, here.past : here.past + here.width].to(routing.weights.dtype)
        return replace(routing, weights=weights)


def matched(
    own: "Patch | Replay",
    batch: Batch,
    rows: Sequence[int],
    records: Sequence[Record],
    layers: Sequence[int],
    read: Any,
) -> Matched:
    """The values of another run's records for the positions of rows of a batch.

    read: gives those of a record and layer.
    """
    rows_of: dict[str, list[int]] = {}
    for row in rows:
        rows_of.setdefault(batch.ids[row], []).append(row)
    meant = in_batch(batch, own.positions, own.steps)
    number, where = steps_of(batch.attention_mask, batch.labels), torch.zeros_like(meant)
    found: dict[int, dict[int, tuple[Tensor, ...]]] = {layer: {} for layer in layers}
    for record in records:
        known = record if batch.labels is not None else record.without_answers()
        there = known.position_mask(own.positions)[:, record.kept.to(known.attention_mask.device)]
        parts = {layer: read(record, layer) for layer in layers}
        for source_row, name in enumerate(record.ids):
            for row in rows_of.get(name, ()):
                theirs, ours = there[source_row].nonzero()[:, 0], meant[row].nonzero()[:, 0]
                if record.labels is None and batch.labels is not None:
                    ours = ours[number[row, ours] <= 0]  # their prompt alone was run
                theirs, ours = _aligned(theirs, ours, own.align, name, own.positions)
                where[row, ours] = True
                for layer, several in parts.items():
                    found[layer][row] = tuple(
                        part[source_row].index_select(0, theirs.to(part.device)) for part in several
                    )
    values = {
        layer: tuple(torch.cat(part) for part in zip(*(of_rows[row] for row in sorted(of_rows)), strict=True))
        for layer, of_rows in found.items()
    }
    return Matched(where, values)


def matched_mask(own: "Patch | Replay", here: Here) -> Tensor:
    """Where in a pass a patch has values, bool [batch, pos]."""
    if here.batch is None:
        raise MoELensError(
            "values of another run are matched by example; run examples by lens.records, lens.generate or what builds "
            "on them, not a trace of your own"
        )
    if here.past >= here.prompt:
        return torch.zeros(here.rows, here.width, dtype=torch.bool, device=here.device)
    where: Tensor = here.once((id(own), "where"), lambda: here.prepared[id(own)].where.to(here.device))
    return where[:, here.past : here.past + here.width]


def expect_align(align: str) -> None:
    """MoELensError unless it is a way to match positions."""
    if align not in ("exact", "start", "end"):
        raise MoELensError(f"align must be 'exact', 'start' or 'end'; got {align!r}")


def _aligned(theirs: Tensor, ours: Tensor, align: Align, name: str, positions: object) -> tuple[Tensor, Tensor]:
    """As many positions of both runs, [place]; MoELensError where "exact" ones are not equally many."""
    if align == "exact" and len(theirs) != len(ours):
        raise MoELensError(
            f"example {name!r} has {len(ours)} positions {positions!r} and {len(theirs)} in the run that values are "
            "taken from; take examples of equal length, other positions, or align='start' or 'end'"
        )
    shared = min(len(theirs), len(ours))
    if align == "end":
        return theirs[len(theirs) - shared :], ours[len(ours) - shared :]
    return theirs[:shared], ours[:shared]
