"""The interventions in force on a model, and applying them to a layer while the model runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_lens.architecture import Inputs, MoEArchitecture
from moe_lens.data import Batch
from moe_lens.lens.interventions import Intervention, check_interventions
from moe_lens.lens.interventions.deciding import RouterChange, decide
from moe_lens.lens.interventions.place import Here
from moe_lens.lens.interventions.protocol import acts_in, edits_gating
from moe_lens.lens.reader import TraceReader
from moe_lens.routing import Routing

CPU = torch.device("cpu")


class InterventionStack:
    """The interventions in force, from the outermost block to the innermost, in which order they act.

    What they ask of a router is asked at once, before it selects; gating weights are edited one after another.

    interventions: as they were given; a new tuple whenever they change.
    """

    def __init__(self, architecture: MoEArchitecture) -> None:
        self._architecture = architecture
        self.interventions: tuple[Intervention, ...] = ()
        self._acting: tuple[Intervention, ...] = ()
        self._asked: dict[tuple[int, torch.device], dict[int, RouterChange]] = {}
        self._batch: Batch | None = None
        self._kept: dict[Any, Any] = {}
        self._before: dict[int, Routing] | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """The MoE layers that any of them acts on, in rising order."""
        return tuple(
            layer for layer in self._architecture.moe_layers if any(acts_in(own, layer) for own in self.interventions)
        )

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
    def for_batch(self, batch: Batch) -> Iterator[None]:
        """Inside the block, this batch runs; MoELensError, naming the example, for one where nothing could act."""
        for own in self._acting:
            own.expect(batch)
        self._batch, self._kept = batch, {}
        try:
            yield
        finally:
            self._batch, self._kept = None, {}

    @contextmanager
    def recording(self) -> Iterator[dict[int, Routing]]:
        """Inside the block, `apply` leaves the routing from before the interventions here, by layer."""
        self._before = {}
        try:
            yield self._before
        finally:
            self._before = None

    def apply(self, layer: int, reader: TraceReader, *, past: int, prompt: int | None) -> int:
        """Act on one pass through `layer` of the running model, of which `past` positions passed before.

        First the router decides anew, as it is asked to, then the experts' gating is edited.
        prompt: positions of the first pass; None in this one. Gives the positions of this pass.
        """
        site, router = reader.architecture.at(layer), reader.router(layer)
        acting = [own for own in self._acting if acts_in(own, layer)]
        asking = [own for own in acting if self._change(layer, own) or replays(own)]
        before = blended = None
        if asking:
            call = router.inputs
            here = self._here(layer, reader, _hidden(call), past, prompt)
            if self._before is not None or any(own.compares for own in acting):
                before = Routing(*map(reader.by_position, site.decision(router.output)))
            router.output, blended = self._decided(here, asking, reader, call)
        logits, _, _ = site.decision(router.output)
        call, gating = reader.gating(layer)
        decided = blended or Routing(*map(reader.by_position, (logits, *gating)))
        if not asking:
            here = self._here(layer, reader, logits, past, prompt)
        here = replace(here, before=before, decided=decided)
        routing = decided
        for own in acting:
            if edits_gating(own):
                mask, edited = own.mask(here), own(here, routing)
                routing = edited if mask is None else routing.where(mask, edited)
        if blended is not None or routing is not decided:
            reader.set_gating(
                layer, site.with_gating(call, routing.indices.flatten(0, 1), routing.weights.flatten(0, 1))
            )
        if self._before is not None:
            self._before[layer] = before or decided
        return here.width

    def _decided(
        self, here: Here, asking: Sequence[Intervention], reader: TraceReader, call: Inputs
    ) -> tuple[Any, Routing | None]:
        """The router's output when it decides as all of these ask; and the routing, where k differs by token."""
        site, router = reader.architecture.at(here.layer), reader.router(here.layer)
        own_k, parts, sizes = site.observed.top_k, [], set()
        for own in asking:
            change, mask = self._change(here.layer, own), own.mask(here)
            asked = replace(self._change(here.layer, own, here.device), selected=own.selection(here, own_k))
            parts.append(asked.per_token(here.rows, here.width, mask))
            if change.top_k is not None:
                sizes |= {int(k) or own_k for k in change.top_k.flatten()} | ({own_k} if mask is not None else set())
        together = RouterChange.together(parts)
        tokens = here.rows * here.width
        outputs = {k: decide(site, router, call, together, n_tokens=tokens, top_k=k) for k in sorted(sizes or {own_k})}
        widest = outputs[max(outputs)]
        if len(outputs) == 1:
            return widest, None
        routing = None
        for k, output in outputs.items():
            of_k = Routing(*map(reader.by_position, site.decision(output)))
            wanted = reader.by_position(together.top_k)[..., 0]
            at_k = (wanted == k) | (wanted == 0) if k == own_k else wanted == k
            routing = of_k if routing is None else routing.where(at_k, of_k)
        return widest, routing

    def _change(self, layer: int, own: Intervention, device: torch.device = CPU) -> RouterChange:
        """What one intervention asks of a layer's router, on a device; worked out once, not at every step."""
        key = id(own), device
        if key not in self._asked and device == CPU:
            layers = [layer for layer in self._architecture.moe_layers if acts_in(own, layer)]
            self._asked[key] = {layer: own.asks(layer, self._architecture.n_experts) for layer in layers}
        elif key not in self._asked:
            self._change(layer, own)
            self._asked[key] = RouterChange.on(device, self._asked[id(own), CPU])
        return self._asked[key][layer]

    def _here(self, layer: int, reader: TraceReader, tokens: Tensor, past: int, prompt: int | None) -> Here:
        """Where the run is; tokens: anything of the pass, [token, x] or [batch, pos, x]."""
        rows = reader.n_rows()
        width = tokens.shape[:-1].numel() // rows
        prompt = width if prompt is None else prompt
        return Here(layer, rows, width, past, prompt, self._batch, tokens.device, self._kept)

    @contextmanager
    def _act(self, interventions: tuple[Intervention, ...]) -> Iterator[None]:
        """Inside the block these act; what they ask is worked out once, not at every step."""
        outer = self._acting, self._asked, self._kept
        self._acting, self._kept = interventions, {}
        self._asked = {}
        try:
            yield
        finally:
            self._acting, self._asked, self._kept = outer


def replays(intervention: Intervention) -> bool:
    """Whether it has a selection for the router."""
    return type(intervention).selection is not Intervention.selection


def _hidden(call: Inputs) -> Tensor:
    """What a router is given, [token, d_model] or [batch, pos, d_model]."""
    arguments, named = call
    found: Tensor = arguments[0] if arguments else named["hidden_states"]
    return found
