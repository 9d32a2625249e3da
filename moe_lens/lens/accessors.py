"""What of a lens is read inside a trace, by absolute layer; of a lens all that a server needs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_lens.errors import MoELensError
from moe_lens.lens.reader import TraceReader


@dataclass(frozen=True)
class ByLayer:
    """`accessor[i]` reads layer i, by absolute index; `accessor[i] = value` replaces it where that counts."""

    read: Callable[[int], Any]
    write: Callable[[int, Any], None] | None = None

    def __getitem__(self, layer: int) -> Any:
        return self.read(layer)

    def __setitem__(self, layer: int, value: Any) -> None:
        if self.write is None:
            raise MoELensError(
                "this value can only be read: replacing what a router or attention reports changes nothing; "
                "use lens.intervene(...), or assign lens.gating_weights[i] or lens.layers_output[i]"
            )
        self.write(layer, value)


class Accessors:
    """The accessors of a lens, as its class lists them, and where layers and experts are."""

    def __init__(self, reader: TraceReader) -> None:
        self.model, self.architecture = reader.model, reader.architecture
        self.routers = ByLayer(reader.router)
        self.router_logits = ByLayer(reader.router_logits)
        self.selected_experts = ByLayer(reader.selected_experts)
        self.gating_weights = ByLayer(reader.gating_weights, reader.set_gating_weights)
        self.expert_outputs = ByLayer(reader.expert_outputs, reader.set_expert_outputs)
        self.moe_output = ByLayer(reader.moe_output, reader.set_moe_output)
        self.layers_output = ByLayer(reader.layer_output, reader.set_layer_output)
        self.attention_rows = ByLayer(reader.attention)
