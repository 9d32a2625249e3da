"""Reading a running model's routing, attention and residual stream, layer by layer, inside a trace."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.architecture import MoEArchitecture
from moe_lens.architecture.quantized import is_expert_parallel, is_parallel
from moe_lens.errors import MoELensError
from moe_lens.lens.devices import OnDevices
from moe_lens.lens.single_outputs import SingleOutputs
from moe_lens.routing import contribution


@dataclass(frozen=True)
class TraceReader:
    """What a layer's modules hold while `model`, the traced one, runs.

    All raise MoELensError for a layer that is not there; what is about routing also in a trace of several
    invokes, since routing is flattened over the whole batch and cannot be told apart.

    remote: whether the model runs on a server, so that nothing can be put around a trace of it.
    """

    model: Any
    architecture: MoEArchitecture
    remote: bool = False
    single: SingleOutputs = field(default_factory=SingleOutputs, repr=False)

    def __reduce__(self) -> tuple[type["TraceReader"], tuple[Any, MoEArchitecture, bool]]:
        """What of it is sent with a trace to a server; MoELensError for one of a model that runs here."""
        if not self.remote:
            raise MoELensError(
                "expected a trace that is sent to a server to be of a lens that is opened for one, "
                "MoELens.from_pretrained(…, remote=…); this lens runs its model here"
            )
        return TraceReader, (self.model, self.architecture, self.remote)

    @property
    def module(self) -> nn.Module:
        """The model without tracing."""
        found: nn.Module = self.model._module
        return found

    @property
    def gates_parts(self) -> bool:
        """Whether gating weights are given, in each process, to the part of every expert that it holds."""
        site = self.architecture.moe[0]
        experts = self.module.get_submodule(site.experts)
        return is_parallel(self.module) and site.gating_side == "inputs" and not is_expert_parallel(experts)

    def watching_experts(self, layers: Iterable[int]) -> AbstractContextManager[None]:
        """Inside the block `expert_outputs` of these layers takes them from the experts' own run, where it can."""
        if self.remote or is_parallel(self.module):
            return nullcontext()  # what a process runs there is a part of the experts, or of what they put out
        return self.single.watching(self.module.get_submodule(self.architecture.at(layer).experts) for layer in layers)

    def router(self, layer: int) -> Any:
        """The traced router module."""
        return self.model.get(self.architecture.at(layer).router)

    def experts(self, layer: int) -> Any:
        """The traced module of all routed experts."""
        return self.model.get(self.architecture.at(layer).experts)

    def router_logits(self, layer: int) -> Tensor:
        """Router logits before any softmax, [batch, pos, expert]."""
        logits, _, _ = self.architecture.at(layer).decision(self.router(layer).output)
        return self._of_one_invoke(logits)

    def selected_experts(self, layer: int) -> Tensor:
        """Indices of the selected experts as the experts get them, int64 [batch, pos, k]."""
        _, (indices, _) = self.gating(layer)
        return self._of_one_invoke(indices)

    def gating_weights(self, layer: int) -> Tensor:
        """Gating weights as the experts get them, [batch, pos, k]."""
        _, (_, weights) = self.gating(layer)
        return self._of_one_invoke(weights)

    def used_gating(self, layer: int) -> tuple[Tensor, Tensor]:
        """Indices of the selected experts and their gating weights as the experts get them, each [batch, pos, k]."""
        _, (indices, weights) = self.gating(layer)
        return self._of_one_invoke(indices), self._of_one_invoke(weights)

    def set_gating_weights(self, layer: int, weights: Tensor) -> None:
        """Give the experts other gating weights, [batch, pos, k]."""
        call, (indices, old) = self.gating(layer)
        self.set_gating(layer, self.architecture.at(layer).with_gating(call, indices, weights.reshape(old.shape)))

    def gating(self, layer: int) -> tuple[Any, tuple[Tensor, Tensor]]:
        """The call that carries the gating, and its indices and weights, each [token, k]."""
        site = self.architecture.at(layer)
        call = getattr(self.model.get(site.gating_module), site.gating_side)
        return call, site.gating(call)

    def set_gating(self, layer: int, call: Any) -> None:
        """Put another call in the place of the one that carries the gating."""
        site = self.architecture.at(layer)
        setattr(self.model.get(site.gating_module), site.gating_side, call)

    def expert_outputs(self, layer: int, kept: OnDevices | None = None) -> Tensor:
        """What each selected expert makes of its token, before its gating weight, [batch, row, k, d_model].

        From the experts' own run in a `watching_experts` block, or where they give single outputs themselves, else from
        a second call, one expert at a time. kept: positions, int64 [row]; None for all. The sum over k of gating weight
        times output is the experts' output, less `MoELayer.added`; the block multiplies it by `MoELayer.scale_after`.
        Raises MoELensError where an expert has no output before its gating weight.
        """
        site, experts = self.architecture.at(layer), self.experts(layer)
        if site.no_single_outputs:
            raise MoELensError(
                f"{site.no_single_outputs} in {site.experts!r}, so single outputs cannot be told; leave "
                "'expert_outputs' out of what is captured"
            )
        indices = self.selected_experts(layer)
        batch, width, k = indices.shape
        rows = torch.arange(width, device=indices.device) if kept is None else kept.on(indices.device)
        if site.outputs_module is not None:
            call = getattr(self.model.get(site.gating_module), site.gating_side)
            single = site.in_slots(call, self.model.get(site.outputs_module).output)
            return single.view(batch, width, k, -1)[:, rows]
        tokens = (torch.arange(batch, device=rows.device)[:, None] * width + rows).flatten()
        call, module = experts.inputs, self.module.get_submodule(site.experts)
        if self.single.watches(module):
            _ = experts.output  # waits until they have run
            seen = self.single.of(module, None if kept is None else tokens, k)
            if seen is not None:
                return seen.view(batch, len(rows), k, seen.shape[-1])
        run = tokens if len(tokens) else tokens.new_zeros(1)  # some experts cannot be called without any token
        arguments, named = site.each_selected(call, None if kept is None else run)
        outputs: Tensor = experts(*arguments, **named)
        single = outputs.reshape(len(run), k, -1)[: len(tokens)]
        return single.reshape(batch, len(rows), k, single.shape[-1])

    def router_input(self, layer: int) -> Tensor:
        """What the router is given of each token, [batch, pos, d_model]."""
        arguments, named = self.router(layer).inputs
        hidden = arguments[0] if arguments else named["hidden_states"]
        return hidden if hidden.ndim == 3 else self._of_one_invoke(hidden)

    def set_router_input(self, layer: int, hidden: Tensor) -> None:
        """Give the router, and it alone, something else of each token, [batch, pos, d_model]."""
        router = self.router(layer)
        arguments, named = router.inputs
        if arguments:
            router.inputs = (hidden.view(arguments[0].shape), *arguments[1:]), named
        else:
            router.inputs = arguments, {**named, "hidden_states": hidden.view(named["hidden_states"].shape)}

    def contribution(self, layer: int, experts: Sequence[int] | None = None) -> Tensor:
        """What experts add to their sum, of a set or all, those that a token selects, float32 [batch, pos, d_model].

        Raises MoELensError where single outputs cannot be told.
        """
        indices, weights = self.used_gating(layer)
        return contribution(indices, weights, self.expert_outputs(layer), experts)

    def set_expert_outputs(self, layer: int, outputs: Tensor) -> None:
        """Continue as if the selected experts had put out this, before their gating weights, [batch, pos, k, d_model].

        Their sum changes by gating weight times difference, so that what is as it was changes no bit.
        """
        indices, weights = self.used_gating(layer)
        change = outputs.float() - self.expert_outputs(layer).float()
        self.add_to_routed(layer, contribution(indices, weights, change, None))

    def routed_sum(self, layer: int) -> Tensor:
        """What the routed experts put out together, [batch, pos, d_model]."""
        output = _first(self.experts(layer).output)
        return output.reshape(self.n_rows(), -1, output.shape[-1])

    def add_to_routed(self, layer: int, change: Tensor) -> None:
        """Add a change [batch, pos, d_model] to the sum that the routed experts put out."""
        site = self.architecture.at(layer)
        experts = self.experts(layer)
        output = _first(experts.output)
        if output.numel() != change.numel():
            raise MoELensError(f"the experts at {site.experts!r} put out {list(output.shape)}, not one sum per token")
        changed = output + change.to(output.dtype).view(output.shape)
        experts.output = (changed, *experts.output[1:]) if isinstance(experts.output, tuple) else changed

    def shared_output(self, layer: int) -> Tensor:
        """What the shared experts add to the routed sum, [batch, pos, d_model].

        Raises MoELensError for a layer without shared experts, or where it cannot be told what is added.
        """
        site = self.architecture.at(layer)
        if site.shared_experts is None or site.shared_scale is None:
            raise MoELensError(f"layer {layer} {site.no_shared_output}; leave 'shared_output' out of what is captured")
        module = self.model.get(site.shared_experts)
        gate: Tensor | None = None
        if site.shared_gate is not None:  # called again: it may run at another moment
            arguments, named = module.inputs
            gate = self.model.get(site.shared_gate)(*arguments, **named).sigmoid()
        output: Tensor = module.output if gate is None else gate * module.output
        output = output if site.shared_scale == 1 else site.shared_scale * output
        return output if output.ndim == 3 else self._of_one_invoke(output)

    def moe_output(self, layer: int) -> Tensor:
        """What the layer's MoE block gives, with the shared experts that are inside it, [batch, pos, d_model]."""
        path = self.architecture.at(layer).experts.rpartition(".")[0]
        if path in self.architecture.layers:
            raise MoELensError(f"layer {layer} has no module around its experts whose output could be read")
        output = _first(self.model.get(path).output)
        return output if output.ndim == 3 else output.reshape(self.n_rows(), -1, self.architecture.d_model)

    def set_moe_output(self, layer: int, output: Tensor) -> None:
        """Continue with another output of the layer's MoE block, [batch, pos, d_model]."""
        old = self.moe_output(layer)
        envoy = self.model.get(self.architecture.at(layer).experts.rpartition(".")[0])
        whole = envoy.output
        new = output.view(_first(whole).shape).to(old.dtype)
        envoy.output = (new, *whole[1:]) if isinstance(whole, tuple) else new

    def await_layer(self, layer: int) -> None:
        """Wait until the layer's pass begins."""
        _ = self._layer(layer).inputs

    def layer_output(self, layer: int) -> Tensor:
        """The residual stream after the layer, [batch, pos, d_model]."""
        return _first(self._layer(layer).output)

    def set_layer_output(self, layer: int, residual: Tensor) -> None:
        """Continue with another residual stream, [batch, pos, d_model]."""
        envoy = self._layer(layer)
        output = envoy.output
        envoy.output = (residual, *output[1:]) if isinstance(output, tuple) else residual

    def attention(self, layer: int) -> Tensor:
        """Attention of the chosen queries, [batch, head, row, pos]; MoELensError where it is not computed."""
        path = self._path(self.architecture.attentions, layer)
        if path is None:
            raise MoELensError(f"layer {layer} has no attention")
        _, weights, *_ = self.model.get(path).output
        if not isinstance(weights, Tensor):
            raise MoELensError(
                "attention is not computed row by row here; open `with attention_rows(lens.module, rows):` "
                "(moe_lens.lens.attention) around the trace"
            )
        return weights

    def by_position(self, tokens: Tensor) -> Tensor:
        """[token, x] of the whole batch as [batch, pos, x]: routers and experts see one axis of tokens."""
        return tokens.reshape(self.n_rows(), -1, tokens.shape[-1])

    def n_rows(self) -> int:
        """Rows of the whole running batch."""
        return int(self.model.interleaver.batcher.total)

    def keep_rows(self, count: int) -> None:
        """From now on in this run, so many rows are left of its batch."""
        self.model.interleaver.batcher.total = count

    def _of_one_invoke(self, tokens: Tensor) -> Tensor:
        if self.model.interleaver.batcher.batching:
            raise MoELensError(
                "routing is flattened over the whole batch, so several invokes cannot be told apart; give "
                "the trace one list of prompts instead"
            )
        return self.by_position(tokens)

    def _layer(self, layer: int) -> Any:
        return self.model.get(self._path(self.architecture.layers, layer))

    def _path(self, paths: Sequence[str | None], layer: int) -> str | None:
        if not 0 <= layer < self.architecture.n_layers:
            raise MoELensError(f"the model has layers 0 to {self.architecture.n_layers - 1}; got {layer}")
        return paths[layer]


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A module's output, or the first thing in it."""
    return output[0] if isinstance(output, tuple) else output
