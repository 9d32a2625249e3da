"""Reading a running model's routing, attention and residual stream, layer by layer, inside a trace."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from einops import rearrange
from torch import Tensor

from moe_lens.architecture import MoEArchitecture
from moe_lens.errors import MoELensError


@dataclass(frozen=True)
class ByLayer:
    """`accessor[i]` reads layer i, by absolute index; `accessor[i] = value` replaces it where that has an effect."""

    read: Callable[[int], Any]
    write: Callable[[int, Any], None] | None = None

    def __getitem__(self, layer: int) -> Any:
        return self.read(layer)

    def __setitem__(self, layer: int, value: Any) -> None:
        if self.write is None:
            raise MoELensError(
                "this value can be read only: replacing what the router or attention reports would change nothing; "
                "use lens.intervene(...), or assign lens.gating_weights[i] or lens.layers_output[i]"
            )
        self.write(layer, value)


@dataclass(frozen=True)
class TraceReader:
    """What a layer's modules hold while `model`, the traced one, runs. Axes are [batch, pos, ...].

    Raises MoELensError for a layer that is not there, and in a trace of several invokes, which would have to
    share routing that is flattened over the whole batch.
    """

    model: Any
    architecture: MoEArchitecture

    def router(self, layer: int) -> Any:
        """The traced router module."""
        return self.model.get(self.architecture.at(layer).router)

    def experts(self, layer: int) -> Any:
        """The traced module of all routed experts."""
        return self.model.get(self.architecture.at(layer).experts)

    def router_logits(self, layer: int) -> Tensor:
        """Router logits before any softmax, [batch, pos, expert]."""
        logits, _, _ = self.architecture.at(layer).decision(self.router(layer).output)
        return self.by_position(logits)

    def selected_experts(self, layer: int) -> Tensor:
        """Indices of the selected experts as the experts get them, int64 [batch, pos, k]."""
        indices, _ = self.architecture.at(layer).gating(self.experts(layer).inputs)
        return self.by_position(indices)

    def gating_weights(self, layer: int) -> Tensor:
        """Gating weights as the experts get them, [batch, pos, k]."""
        _, weights = self.architecture.at(layer).gating(self.experts(layer).inputs)
        return self.by_position(weights)

    def set_gating_weights(self, layer: int, weights: Tensor) -> None:
        """Give the experts other gating weights, [batch, pos, k]."""
        experts, site = self.experts(layer), self.architecture.at(layer)
        inputs = experts.inputs
        indices, old = site.gating(inputs)
        experts.inputs = site.with_gating(inputs, indices, weights.reshape(old.shape))

    def layer_output(self, layer: int) -> Tensor:
        """The residual stream after the layer, [batch, pos, d_model]."""
        output = self._layer(layer).output
        return output[0] if isinstance(output, tuple) else output

    def set_layer_output(self, layer: int, residual: Tensor) -> None:
        """Continue with another residual stream, [batch, pos, d_model]."""
        envoy = self._layer(layer)
        output = envoy.output
        envoy.output = (residual, *output[1:]) if isinstance(output, tuple) else residual

    def attention(self, layer: int) -> Tensor:
        """Attention of the chosen queries, [batch, head, row, pos]; MoELensError where it is not computed."""
        path = self.architecture.attentions[layer]
        if path is None:
            raise MoELensError(f"layer {layer} has no attention")
        output = self.model.get(path).output
        if output[1] is None:
            raise MoELensError(
                "attention is not computed row by row here; open `with attention_rows(lens.module, rows):` "
                "(moe_lens.attention) around the trace"
            )
        return output[1]

    def by_position(self, tokens: Tensor) -> Tensor:
        """[token, x] as [batch, pos, x]: routers and experts see batch and position flattened into one axis."""
        return rearrange(tokens, "(batch pos) x -> batch pos x", batch=self.n_rows())

    def n_rows(self) -> int:
        """Rows of the running batch."""
        batcher = self.model.interleaver.batcher
        if batcher.batching:
            raise MoELensError(
                "routing is flattened over the whole batch, so a trace of several invokes cannot tell theirs apart; "
                "give the trace one list of prompts"
            )
        return batcher.total

    def _layer(self, layer: int) -> Any:
        if not 0 <= layer < self.architecture.n_layers:
            raise MoELensError(f"the model has layers 0 to {self.architecture.n_layers - 1}; got {layer}")
        return self.model.get(self.architecture.layers[layer])
