"""The interventions in force on a model, and applying them to a layer while the model runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from moe_lens.architecture import MoEArchitecture
from moe_lens.errors import MoELensError
from moe_lens.lens.devices import OnDevices
from moe_lens.lens.interventions import Intervention, WithoutExperts, check_interventions, excluded_by
from moe_lens.lens.reader import TraceReader
from moe_lens.routing import Routing


class InterventionStack:
    """The interventions in force, from the outermost block to the innermost, in which order they act.

    interventions: as they were given; a new tuple whenever they change.
    """

    def __init__(self, architecture: MoEArchitecture) -> None:
        self._architecture = architecture
        self.interventions: tuple[Intervention, ...] = ()
        self._acting: tuple[Intervention, ...] = ()
        self._excluded = _Excluded((), architecture)
        self._before: dict[int, Routing] | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that any of them acts on, in rising order."""
        return tuple(sorted({layer for own in self.interventions for layer in own.layers}))

    @contextmanager
    def adding(self, interventions: Sequence[Intervention]) -> Iterator[None]:
        """Inside the block these are in force too; MoELensError if the model cannot be put under them."""
        outer = self.interventions
        together = (*outer, *interventions)
        check_interventions(together, self._architecture)
        self.interventions = together
        try:
            with self._act(together):
                yield
        finally:
            self.interventions = outer

    @contextmanager
    def for_examples(self, places: Sequence[int]) -> Iterator[None]:
        """Inside the block, interventions that differ by example are those of the examples at `places`."""
        taken = tuple(own.take(places) for own in self.interventions)
        if all(mine is own for mine, own in zip(taken, self._acting, strict=True)):
            yield  # nothing differs by example
            return
        with self._act(taken):
            yield

    @contextmanager
    def recording(self) -> Iterator[dict[int, Routing]]:
        """Inside the block, `apply` leaves the routing from before the interventions here, by layer."""
        self._before = {}
        try:
            yield self._before
        finally:
            self._before = None

    def apply(self, layer: int, reader: TraceReader) -> None:
        """Act on one pass through `layer` of the running model.

        First the router decides anew without the excluded experts, then the experts' gating is edited.
        """
        site = reader.architecture.at(layer)
        router = reader.router(layer)
        if layer in self._excluded:
            arguments, named = router.inputs
            decided = site.decision(router.output)
            excluded = self._excluded.per_token(layer, decided[0], reader.n_rows())
            mode = WithoutExperts(excluded, map_width=site.observed.map_width)
            with mode:
                rerouted = router(*arguments, **named)
            mode.check(site.router, chooses=site.observed.output_slots is not None)
            router.output = rerouted
            logits, _, _ = site.decision(rerouted)
            call, gating = reader.gating(layer)
        else:
            logits, _, _ = site.decision(router.output)
            call, gating = reader.gating(layer)
            decided = logits, *gating
        routing = Routing(*map(reader.by_position, (logits, *gating)))
        for intervention in self._acting:
            if layer in intervention.layers:
                routing = intervention(layer, routing)
        edited = site.with_gating(call, routing.indices.flatten(0, 1), routing.weights.flatten(0, 1))
        reader.set_gating(layer, edited)
        if self._before is not None:
            self._before[layer] = Routing(*map(reader.by_position, decided))

    @contextmanager
    def _act(self, interventions: tuple[Intervention, ...]) -> Iterator[None]:
        """Inside the block these act; what they exclude is worked out once, not at every step."""
        outer = self._acting, self._excluded
        self._acting, self._excluded = interventions, _Excluded(interventions, self._architecture)
        try:
            yield
        finally:
            self._acting, self._excluded = outer


class _Excluded:
    """What interventions exclude, of all layers in one tensor, so that a device gets it at once."""

    def __init__(self, interventions: Sequence[Intervention], architecture: MoEArchitecture) -> None:
        self._places: dict[int, tuple[slice, bool]] = {}
        masks = torch.zeros(0, architecture.n_experts, dtype=torch.bool)
        for layer in sorted({layer for own in interventions for layer in own.layers}):
            mask = excluded_by(interventions, layer, architecture.n_experts)
            if mask is not None:
                start, by_row = len(masks), mask.ndim == 2
                masks = torch.cat([masks, mask if by_row else mask[None]])
                self._places[layer] = slice(start, len(masks)), by_row
        self._masks = OnDevices(masks)

    def __contains__(self, layer: int) -> bool:
        """Whether anything is excluded in the layer."""
        return layer in self._places

    def per_token(self, layer: int, logits: Tensor, n_rows: int) -> Tensor:
        """The experts excluded in `layer` for each token of the batch, bool like `logits` [token, expert]."""
        places, by_row = self._places[layer]
        excluded = self._masks.on(logits.device)[places]  # [batch or 1, expert]
        if not by_row:
            return excluded.expand(logits.shape)
        if len(excluded) != n_rows:
            raise MoELensError(f"expected one intervention per row; Rows has {len(excluded)} for a batch of {n_rows}")
        return excluded.repeat_interleave(len(logits) // n_rows, dim=0, output_size=len(logits))
