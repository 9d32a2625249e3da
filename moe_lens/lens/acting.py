"""Acting: interventions at work in a running model; of what a lens keeps of them all that a server needs."""

from typing import Any

import torch

from moe_lens.architecture import MoEArchitecture
from moe_lens.data import Batch
from moe_lens.lens.interventions.deciding import RouterChange
from moe_lens.lens.interventions.place import Here
from moe_lens.lens.interventions.protocol import Intervention, acts_in
from moe_lens.lens.layer_pass import CPU, LayerPass
from moe_lens.lens.reader import TraceReader
from moe_lens.routing import Routing


class Acting:
    """Applies interventions to a layer while the model runs, those of each layer in their order.

    What they ask of a router is asked at once, before it selects; gating weights are edited one after another.

    before: the routing from before the interventions, by layer, of the run that is recorded; None where none is.
    """

    def __init__(
        self,
        architecture: MoEArchitecture,
        acting_in: dict[int, list[Intervention]] | None = None,
        batch: Batch | None = None,
        records: bool = False,
    ) -> None:
        self._architecture = architecture
        self._acting_in: dict[int, list[Intervention]] = acting_in or {}
        self._asked: dict[tuple[int, torch.device], dict[int, RouterChange]] = {}
        self._batch = batch
        self._kept: dict[Any, Any] = {}
        self._prepared: dict[int, Any] = {}
        self.before: dict[int, Routing] | None = {} if records else None

    def apply(self, layer: int, reader: TraceReader, *, past: int, prompt: int | None) -> int:
        """Act on one pass through `layer` of the running model, of which `past` positions passed before.

        prompt: positions of the first pass; None in this one. Gives the positions of this pass.
        """
        if past and any(own.by_row for own in self._acting_in.get(layer, ())):
            reader.await_layer(layer)  # until then rows may leave
        acting = self._acting_in.get(layer)
        if not acting:
            return int(reader.layer_output(layer).shape[1])  # at rest; a step that touches nothing would not end
        running = LayerPass(self, layer, reader, acting, past, prompt, records=self.before is not None)
        width = running.run()
        if self.before is not None and running.before is not None:
            self.before[layer] = running.before
        return width

    def here(self, layer: int, rows: int, width: int, past: int, prompt: int, device: torch.device) -> Here:
        """Where a run is when interventions are called in it."""
        return Here(layer, rows, width, past, prompt, self._batch, device, self._kept, self._prepared)

    def change(self, layer: int, own: Intervention, device: torch.device = CPU) -> RouterChange:
        """What one intervention asks of a layer's router, on a device; worked out once, not at every step."""
        key = id(own), device
        if key not in self._asked and device == CPU:
            layers = [layer for layer in self._architecture.moe_layers if acts_in(own, layer)]
            self._asked[key] = {layer: own.asks(layer, self._architecture.n_experts) for layer in layers}
        elif key not in self._asked:
            self.change(layer, own)
            self._asked[key] = RouterChange.on(device, self._asked[id(own), CPU])
        return self._asked[key][layer]
