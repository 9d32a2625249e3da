"""The classes that make a block of listed experts readable, and how they are put on it and taken off again."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.routing import SCORE_FUNCTIONS, ScoringRule


@dataclass(frozen=True)
class Parts:
    """The names of a block's children; `shared` may be None."""

    router: str
    experts: str
    shared: str | None


def parts_of(block: nn.Module) -> Parts | None:
    """What a block of listed experts consists of, None for any other module.

    A list of modules, a weight [expert, d_model] beside it, and at most one more module with weights: what is shared.
    """
    children = dict(block.named_children())
    lists = {name: len(child) for name, child in children.items() if type(child) is nn.ModuleList and len(child) > 1}
    if len(lists) != 1:
        return None
    [(experts, n_experts)] = lists.items()
    weights = {name: getattr(child, "weight", None) for name, child in children.items()}
    routers = [
        name
        for name, weight in weights.items()
        if isinstance(weight, Tensor) and weight.ndim == 2 and len(weight) == n_experts
    ]
    rest = [name for name in children if name not in (experts, *routers)]
    others = [name for name in rest if next(children[name].parameters(), None) is not None]
    if len(routers) != 1 or len(others) > 1:
        return None
    return Parts(routers[0], experts, next(iter(others), None))


class ScoringRouter(nn.Module):
    """A gate [token, d_model] -> logits [token, expert] that also makes the choice, by `rule`.

    It returns logits, gating weights [token, k] and indices [token, k].
    """

    rule: ScoringRule
    top_k: int

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = super().forward(hidden_states)
        indices = SCORE_FUNCTIONS[self.rule.score](logits).topk(self.top_k, dim=-1).indices
        return logits, self.rule.weights(logits, indices).to(hidden_states.dtype), indices


class ChoosingRouter(nn.Module):
    """A gate of `weight` [expert, d_model] that makes the choice by its own code, and keeps its logits to itself.

    It returns what a `ScoringRouter` does, weights times the block's `scale`.
    """

    scale: float
    weight: Tensor

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        [(indices, weights)] = choices_in(super().forward(hidden_states[None]))
        logits = nn.functional.linear(hidden_states.float(), self.weight.float())
        return logits, weights * self.scale, indices


class IndexedExperts(nn.ModuleList):
    """A list of experts, called as the fused experts of transformers are; a token's outputs are added up.

    Hidden states [token, d_model], indices [token, k] and gating weights [token, k] give [token, d_model].
    """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden_states, dtype=top_k_weights.dtype)
        for expert in top_k_index.unique().tolist():
            token, slot = torch.where(top_k_index == expert)
            output = self[expert](hidden_states[token]) * top_k_weights[token, slot, None]
            total = total.index_add(0, token, output.to(total.dtype))
        return total.to(hidden_states.dtype)


class RoutedBlock(nn.Module):
    """An MoE block [..., d_model] -> [..., d_model] that is nothing but router, routed experts and shared experts.

    Where it `returns_logits`, those of the router [token, expert] come second.
    """

    parts: Parts
    returns_logits: bool

    def forward(self, hidden_states: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits, weights, indices = getattr(self, self.parts.router)(tokens)
        output = getattr(self, self.parts.experts)(tokens, indices, weights)
        if self.parts.shared is not None:
            output = output + getattr(self, self.parts.shared)(tokens)
        output = output.view(hidden_states.shape)
        return (output, logits) if self.returns_logits else output


READABLE = (ScoringRouter, ChoosingRouter, IndexedExperts, RoutedBlock)


@dataclass(frozen=True)
class BlockRouting:
    """How a block routes: the class that its router gets, and the facts that class needs."""

    parts: Parts
    returns_logits: bool
    router: type
    facts: dict[str, Any]


def exchange(block: nn.Module, routing: BlockRouting) -> None:
    """Give the block, its router and its experts the classes of this module, on top of their own."""
    parts = routing.parts
    _put(getattr(block, parts.router), routing.router, routing.facts)
    _become(getattr(block, parts.experts), IndexedExperts)
    _put(block, RoutedBlock, {"parts": parts, "returns_logits": routing.returns_logits})


def _put(module: nn.Module, readable: type, facts: dict[str, Any]) -> None:
    own = type(module)
    _become(module, type(own.__name__, (readable, own), {"__module__": own.__module__, **facts}))


def _become(module: nn.Module, kind: type) -> None:
    """Give a module another class, also where accelerate's hook runs its forward pass for it."""
    module.__class__ = kind
    if "_old_forward" in vars(module):
        vars(module)["_old_forward"] = kind.forward.__get__(module)  # type: ignore[attr-defined]


def restore(model: nn.Module) -> None:
    """Undo `normalize`: each module gets its own class, and with it its own forward pass, back."""
    for module in model.modules():
        if isinstance(module, READABLE):
            _become(module, type(module).__bases__[-1])


def choices_in(decided: Any) -> list[tuple[Tensor, Tensor]]:
    """Selected experts and gating weights, both [token, k], in what a router returned: one pair, or none."""
    tensors = [part for part in as_tuple(decided) if isinstance(part, Tensor) and part.ndim == 2]
    indices = [part for part in tensors if not part.is_floating_point()]
    weights = [part for part in tensors if part.is_floating_point() and indices and part.shape == indices[0].shape]
    return list(zip(indices, weights, strict=True)) if len(indices) == 1 and len(weights) == 1 else []


def as_tuple(output: Any) -> tuple[Any, ...]:
    """What a module returned, one value too, as a tuple."""
    return output if isinstance(output, tuple) else (output,)
