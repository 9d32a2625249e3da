"""MoELayer: where the modules of one MoE layer are, and how to read and edit what goes through them."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_lens.architecture.router_probe import ObservedRouter
from moe_lens.errors import MoELensError
from moe_lens.routing import IN_TURN, SHARED_IN_SUM

OUTPUT_WEIGHT_NAMES = ("down_proj", "down_proj_bias", "mlp.w2", "output_linear.weight")
LISTED_OUTPUT_NAMES = ("down_proj", "w2", "fc2")

HIDDEN = (0, "hidden_states")
"""Where the experts' call has their tokens."""

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and keyword arguments of a module's call."""


class Moment(IntEnum):
    """The order of what happens in a layer that has experts, in which a running model has to be read."""

    ATTENTION = 0
    BEFORE_ROUTER = 1
    ROUTER_INPUT = 2
    ROUTER_OUTPUT = 3
    BEFORE_EXPERTS = 4
    EXPERTS_INPUT = 5
    SINGLE_OUTPUTS = 6
    AFTER_EXPERTS = 7
    BLOCK_OUTPUT = 8
    LAYER_OUTPUT = 9


@dataclass(frozen=True)
class MoELayer:
    """Where one MoE layer's modules are and how to read their calls.

    layer: absolute decoder index. router, experts, shared_experts: module paths (the last may be None).
    index_argument, weight_argument: (position, name) of the selected experts and of the gating weights
        among the experts' arguments.
    observed: what the router returns and by which rule.
    scale_after: what the block multiplies the experts' summed output by; the part of a gating weight that the
        experts do not get. Seen when the block is called.
    passed_through: paths of the modules that the experts' summed output goes through in the block after that, such as
        a projection or a norm; mostly none.
    shared_scale, shared_gate: what the shared experts' output is multiplied by before it is added to that sum: a
        number (None where it cannot be told), and the sigmoid of what the module at a path makes of the same input
        (None without). shared_moment: when the shared experts run.
    router_tensors: path and shape of each of the router's parameters and buffers, and of the selection bias that the
        block around it hands to it, where it does.
    """

    layer: int
    router: str
    experts: str
    shared_experts: str | None
    index_argument: tuple[int, str]
    weight_argument: tuple[int, str]
    observed: ObservedRouter
    scale_after: float = 1.0
    passed_through: tuple[str, ...] = ()
    shared_scale: float | None = None
    shared_gate: str | None = None
    shared_moment: Moment = Moment.AFTER_EXPERTS
    router_tensors: tuple[tuple[str, tuple[int, ...]], ...] = ()

    gating_side: ClassVar[str] = "inputs"
    """Whether the gating is among the `inputs` of the module `gating_module` or in its `output`."""
    slots_per_call: ClassVar[int] = 1
    """How many experts a token needs when single outputs are asked for; those after the first get weight 0."""
    no_single_outputs: ClassVar[str] = ""
    """Why single experts' outputs cannot be told; empty where they can."""
    no_output_of_any: ClassVar[str] = ""
    """Why an expert cannot be given a token that does not select it; empty where it can."""

    @property
    def fixed_k(self) -> str:
        """Why a token cannot get another number of experts than the model's; empty where it can."""
        shares = self.observed.scoring.also == SHARED_IN_SUM
        return "experts share their weights with the shared ones" if shares else ""

    @property
    def fixed_selection(self) -> str:
        """Why no experts can be put into the router's selection; empty where they can."""
        if self.observed.chooses_by_token:
            return "it selects experts by a fixed table of token ids"
        if self.observed.output_slots is None:
            return f"the block around {self.router!r} selects, by the logits alone"
        return "it selects one expert after another" if self.observed.scoring.score == IN_TURN else ""

    @property
    def no_shared_output(self) -> str:
        """Why what the shared experts add to the routed sum cannot be told; empty where it can."""
        if self.shared_experts is None:
            return "has no shared experts"
        return "adds its shared experts in its own way" if self.shared_scale is None else ""

    @property
    def takes_tokens(self) -> bool:
        """Whether the experts can be called with some of their tokens alone."""
        return self.gating_side == "inputs"

    @property
    def gating_module(self) -> str:
        """Path of the module at whose call the gating is read and edited."""
        return self.experts

    @property
    def outputs_module(self) -> str | None:
        """Path of a module that puts out what every selected expert gives, in the router's order; None without."""
        return None

    @property
    def added(self) -> str | None:
        """Path of a parameter [d_model] that the experts' own module adds to the sum of their outputs."""
        return None

    def in_slots(self, call: Any, outputs: Tensor) -> Tensor:
        """The `outputs_module`'s output [slot, d_model] as [token, k, d_model]; call: that of `gating_module`."""
        raise NotImplementedError

    def decision(self, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        """A router's output as logits [token, expert], indices [token, k], weights [token, k].

        Where a router returns probabilities instead of logits, these are their logarithms: the logits less a
        constant per token. Where it returns logits only, indices and weights follow from them by its rule.
        """
        slots = self.observed.output_slots
        if slots is None:
            indices = output.topk(self.observed.top_k, dim=-1).indices
            return output, indices, self.observed.scoring.weights(output, indices).to(output.dtype)
        logits, weights, indices = (output[slot] for slot in slots)
        return (logits.log() if self.observed.returns_probabilities else logits), indices, weights

    def gating(self, call: Any) -> tuple[Tensor, Tensor]:
        """Indices [token, k] and gating weights [token, k] in the call of `gating_module`."""
        return _argument(call, self.index_argument), _argument(call, self.weight_argument)

    def with_gating(self, call: Any, indices: Tensor, weights: Tensor) -> Any:
        """The call with other indices [token, k] and gating weights [token, k]."""
        return _replaced(_replaced(call, self.index_argument, indices), self.weight_argument, weights)

    def mixed(self, output: Any, other: Any, mask: Tensor) -> Any:
        """A router's output with that of another call, `other`, at the tokens where `mask`, bool [batch, pos]."""
        if isinstance(output, tuple):
            return tuple(self.mixed(one, two, mask) for one, two in zip(output, other, strict=True))
        by_position = output.shape[: mask.ndim] == mask.shape
        chosen = mask if by_position else mask.flatten()
        return torch.where(chosen.view(*chosen.shape, *[1] * (output.ndim - chosen.ndim)), other, output)

    def each_selected(self, call: Inputs, tokens: Tensor | None) -> Inputs:
        """A call of the experts that returns every selected expert's output by itself, [token * k, d_model].

        Each token is given once per selected expert, with one expert of gating weight 1.
        tokens: int64 [token], which tokens of the call to take; None for all.
        """
        indices, _ = self.gating(call)
        hidden = _argument(call, HIDDEN).flatten(0, -2)
        if tokens is not None:
            indices, hidden = indices[tokens], hidden[tokens]
        return self._one_each(call, hidden.repeat_interleave(indices.shape[-1], dim=0), indices.flatten())

    def alone(self, call: Inputs, tokens: Tensor, expert: int) -> Inputs:
        """A call of the experts in which each of these tokens, int64 [token], has one expert of gating weight 1 alone.

        It returns what the expert makes of them, [token, d_model].
        """
        hidden = _argument(call, HIDDEN).flatten(0, -2)[tokens]
        return self._one_each(call, hidden, tokens.new_full((len(tokens),), expert))

    def _one_each(self, call: Inputs, hidden: Tensor, experts: Tensor) -> Inputs:
        """The call for these tokens [token, d_model] with one expert each, int64 [token], of gating weight 1."""
        _, weights = self.gating(call)
        ones = weights.new_zeros(len(experts), self.slots_per_call)
        ones[:, 0] = 1
        single = experts[:, None].expand(-1, self.slots_per_call)
        made: Inputs = self.with_gating(_replaced(call, HIDDEN, hidden), single, ones)
        return made

    def of_tokens(self, call: Inputs, tokens: Tensor) -> Inputs:
        """A call of the experts with these tokens of `call` alone, int64 [token]."""
        indices, weights = (_argument(call, at)[tokens] for at in (self.index_argument, self.weight_argument))
        named = (self.index_argument, indices), (self.weight_argument, weights)
        for argument, value in ((HIDDEN, _argument(call, HIDDEN).flatten(0, -2)[tokens]), *named):
            call = _replaced(call, argument, value)
        return call

    def output_weights(self, module: nn.Module) -> list[list[Tensor]]:
        """Per routed expert of `module`, the whole model, its last weight and bias, if any; writing to them changes it.

        A weight is [d_model, width] or, as some families store it, [width, d_model]; a bias is [d_model]. An expert
        whose last weights are zero adds nothing. Raises MoELensError if they cannot be told.
        """
        experts = module.get_submodule(self.experts)
        if isinstance(experts, nn.ModuleList):
            return [_last_of_listed(expert, f"{self.experts}.{i}") for i, expert in enumerate(experts)]
        found = dict(experts.named_parameters())
        weights = {name: found[name].data for name in OUTPUT_WEIGHT_NAMES if name in found}
        if not weights:
            raise MoELensError(f"expected one of {OUTPUT_WEIGHT_NAMES} in {self.experts!r}; found {list(found)}")
        stacked = {name for name, weight in weights.items() if weight.ndim == 2 and "bias" not in name}
        by_expert = [
            weight.view(self.observed.n_experts, -1, weight.shape[-1]) if name in stacked else weight
            for name, weight in weights.items()
        ]
        return [list(of_one) for of_one in zip(*by_expert, strict=True)]


@dataclass(frozen=True)
class ScoredInputs(MoELayer):
    """Experts that all see every token, their inputs scaled by gating weights [token, expert], 0 if not selected."""

    gating_side: ClassVar[str] = "output"
    no_single_outputs: ClassVar[str] = "gating weights scale the experts' inputs"
    fixed_k: ClassVar[str] = "experts get scores of all tokens, not a selection"

    @property
    def gating_module(self) -> str:
        return self.router

    def decision(self, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        return output[1], *self.gating(output)

    def gating(self, call: Any) -> tuple[Tensor, Tensor]:
        """The selected have a score; where one was edited to 0, the next by logit is it again."""
        order = call[1].argsort(dim=-1, descending=True, stable=True)
        scored = (call[0] != 0).gather(-1, order).long().argsort(dim=-1, descending=True, stable=True)
        indices = order.gather(-1, scored)[:, : self.observed.top_k]
        return indices, call[0].gather(-1, indices)

    def with_gating(self, call: Any, indices: Tensor, weights: Tensor) -> Any:
        return torch.zeros_like(call[0]).scatter(-1, indices, weights), *call[1:]


@dataclass(frozen=True)
class SortedSlots(MoELayer):
    """Experts that get the tokens sorted by expert: the router returns the order, tokens, weights, counts, logits."""

    gating_side: ClassVar[str] = "output"
    no_output_of_any: ClassVar[str] = "experts get tokens that are sorted by expert"
    fixed_k: ClassVar[str] = "experts get tokens that are sorted by expert"

    @property
    def gating_module(self) -> str:
        return self.router

    def decision(self, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        return output[4], *self.gating(output)

    def gating(self, call: Any) -> tuple[Tensor, Tensor]:
        order, _, sorted_weights, counts, _ = call
        counts = torch.as_tensor(counts, device=order.device)
        by_expert = torch.arange(len(counts), device=order.device).repeat_interleave(counts)
        indices, weights = torch.empty_like(order), torch.empty_like(sorted_weights)
        indices[order], weights[order] = by_expert, sorted_weights
        shape = (-1, self.observed.top_k)
        return indices.view(shape), weights.view(shape)

    def with_gating(self, call: Any, indices: Tensor, weights: Tensor) -> Any:
        """The call with other gating weights; MoELensError for other indices, which the order would not fit."""
        if not torch.equal(indices, self.gating(call)[0]):
            raise MoELensError(f"the experts chosen by {self.router!r} cannot be replaced; change their weights only")
        return (*call[:2], weights.flatten()[call[0]], *call[3:])

    def mixed(self, output: Any, other: Any, mask: Tensor) -> Any:
        """The tokens are sorted anew, as the router does it."""
        decided = (self.decision(output), self.decision(other))
        logits, indices, weights = (super(SortedSlots, self).mixed(*two, mask) for two in zip(*decided, strict=True))
        order = indices.flatten().sort(0).indices
        counts = torch.bincount(indices.flatten(), minlength=self.observed.n_experts)
        sizes = counts.tolist() if isinstance(output[3], list) else counts
        return order, order.div(self.observed.top_k, rounding_mode="trunc"), weights.flatten()[order], sizes, logits

    @property
    def outputs_module(self) -> str:
        return f"{self.experts}.output_linear"

    @property
    def added(self) -> str:
        return f"{self.experts}.bias"

    def in_slots(self, call: Any, outputs: Tensor) -> Tensor:
        ordered = torch.empty_like(outputs)
        ordered[call[0]] = outputs
        return ordered.view(-1, self.observed.top_k, outputs.shape[-1])


@dataclass(frozen=True)
class SeveralSlots(MoELayer):
    """Experts whose code needs at least two selected experts per token."""

    slots_per_call: ClassVar[int] = 2


@dataclass(frozen=True)
class SkippingExperts(MoELayer):
    """A router with one class more, the last, that skips the experts: they get expert 0 with weight 0 for it."""

    fixed_k: ClassVar[str] = "its router can also skip the experts"

    def decision(self, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        logits, indices, weights = MoELayer.decision(self, output)  # nnsight sends no bare super() to a server
        return logits, self._named(indices, weights), weights

    def gating(self, call: Any) -> tuple[Tensor, Tensor]:
        indices, weights = MoELayer.gating(self, call)
        return self._named(indices, weights), weights

    def with_gating(self, call: Any, indices: Tensor, weights: Tensor) -> Any:
        skips = indices == self.observed.n_experts - 1
        return MoELayer.with_gating(self, call, indices.masked_fill(skips, 0), weights.masked_fill(skips, 0))

    def _named(self, indices: Tensor, weights: Tensor) -> Tensor:
        """Expert 0 with weight 0 is how the experts see the skip; it gets its own number again."""
        return indices.masked_fill((indices == 0) & (weights == 0), self.observed.n_experts - 1)


def _last_of_listed(expert: nn.Module, path: str) -> list[Tensor]:
    """The weight and bias of the last linear map of an expert that is a module of its own."""
    children = dict(expert.named_children())
    last = next((children[name] for name in LISTED_OUTPUT_NAMES if name in children), None)
    if last is None:
        raise MoELensError(f"expected one of {LISTED_OUTPUT_NAMES} in {path!r}; found {list(children)}")
    return [parameter.data for parameter in last.parameters()]


def _argument(inputs: Inputs, argument: tuple[int, str]) -> Any:
    (args, kwargs), (position, name) = inputs, argument
    return kwargs[name] if name in kwargs else args[position]


def _replaced(inputs: Inputs, argument: tuple[int, str], value: Tensor) -> Inputs:
    (args, kwargs), (position, name) = inputs, argument
    if name in kwargs:
        return args, {**kwargs, name: value}
    return (*args[:position], value, *args[position + 1 :]), kwargs
