"""MoE blocks whose experts are a list of modules, as files of transformers-4 style have them, made readable.

Such a block chooses and calls its experts inside its own forward pass, often without gradients, so that nothing can
be read or changed there. `normalize` gives its gate and its experts the protocol of transformers >= 5: the router
returns (logits, weights, indices), the experts take (hidden_states, top_k_index, top_k_weights). Only the classes of
the modules are exchanged: parameters and their names stay, and a saved model has its original layout. A block is
exchanged only when its output on random input is reproduced and gradients reach the router and the experts.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.errors import MODEL_CRASHES, MoELensError
from moe_lens.routing import SCORES, ScoringRule

PROBE_TOKENS = 16
MOST_SELECTED = 32
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
HALF_TOLERANCE = 4e-2


class ScoringRouter(nn.Module):
    """A gate [token, d_model] -> logits [token, expert] that also makes the choice, by `rule`."""

    rule: ScoringRule
    top_k: int

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = super().forward(hidden_states)
        indices = SCORES[self.rule.score](logits).topk(self.top_k, dim=-1).indices
        return logits, self.rule.weights(logits, indices).to(hidden_states.dtype), indices


class ChoosingRouter(nn.Module):
    """A gate that makes the choice by its own code, and keeps its logits to itself; `scale` is the block's."""

    scale: float

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        indices, weights = _choice(super().forward(hidden_states[None]))
        logits = nn.functional.linear(hidden_states.float(), self.weight.float())
        return logits, weights * self.scale, indices


class IndexedExperts(nn.ModuleList):
    """A list of experts, called as the fused experts of transformers are; a token's outputs are added up."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden_states, dtype=top_k_weights.dtype)
        for expert in top_k_index.unique().tolist():
            token, slot = torch.where(top_k_index == expert)
            output = self[expert](hidden_states[token]) * top_k_weights[token, slot, None]
            total = total.index_add(0, token, output.to(total.dtype))
        return total.to(hidden_states.dtype)


class RoutedBlock(nn.Module):
    """An MoE block that is nothing but router, routed experts and shared experts."""

    parts: "_Parts"
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


def normalize(model: nn.Module) -> tuple[str, ...]:
    """Make every block of listed experts in `model` readable, in place, and give back the paths of the blocks.

    A model without such blocks, or whose blocks were made readable before, is left as it is. On the meta device a
    copy of the first block of each class, with random weights, speaks for all of its class.
    Raises MoELensError, leaving `model` as it was, for a block whose output cannot be reproduced.
    """
    scales = (1.0, *_scales(model))
    blocks = {path: block for path, block in model.named_modules() if _parts(block) is not None}
    seen: dict[type, _Routing] = {}
    try:
        for path, block in blocks.items():
            own = type(block)
            if not _on_meta(block):
                _make_readable(block, path, scales)
            else:
                if own not in seen:
                    seen[own] = _make_readable(_with_random_weights(block), path, scales)
                _exchange(block, seen[own])
    except BaseException:
        for block in blocks.values():
            restore(block)
        raise
    return tuple(blocks)


def restore(model: nn.Module) -> None:
    """Undo `normalize`: each module gets its own class, and with it its own forward pass, back."""
    for module in model.modules():
        if type(module) is IndexedExperts:
            module.__class__ = nn.ModuleList
        elif isinstance(module, READABLE):
            module.__class__ = type(module).__bases__[1]


@dataclass(frozen=True)
class _Parts:
    """The names of a block's children; `shared` may be None."""

    router: str
    experts: str
    shared: str | None


def _parts(block: nn.Module) -> _Parts | None:
    """What a block of listed experts consists of, None for any other module.

    A list of modules, a weight [expert, d_model] beside it, and at most one more module with weights: what is shared.
    """
    children = dict(block.named_children())
    lists = [name for name, child in children.items() if type(child) is nn.ModuleList and len(child) > 1]
    if len(lists) != 1:
        return None
    weights = {name: getattr(child, "weight", None) for name, child in children.items()}
    routers = [
        name
        for name, weight in weights.items()
        if isinstance(weight, Tensor) and weight.ndim == 2 and len(weight) == len(children[lists[0]])
    ]
    rest = [name for name in children if name not in lists + routers]
    others = [name for name in rest if next(children[name].parameters(), None) is not None]
    return _Parts(routers[0], lists[0], *(others or [None])) if len(routers) == 1 and len(others) <= 1 else None


@dataclass(frozen=True)
class _Routing:
    """How a block routes: the class that its router gets, and the facts that class needs."""

    parts: _Parts
    returns_logits: bool
    router: type
    facts: dict[str, Any]


def _make_readable(block: nn.Module, path: str, scales: Sequence[float]) -> _Routing:
    """Exchange the classes of a block with weights, and prove that it computes what it did; give back how it routes.

    Raises MoELensError, with the classes exchanged or not, for a block whose output cannot be reproduced.
    """
    parts = _parts(block)
    for module in (block, getattr(block, parts.router), getattr(block, parts.experts)):
        if "forward" in vars(module):
            raise MoELensError(
                f"the forward pass of {path!r} is replaced already, as when a model is spread over several devices; "
                "load it on one device"
            )
    with _evaluating(block), _crashes_explained(path):
        tokens = _probe(block, parts)
        with torch.no_grad():
            before = _as_tuple(block(tokens))
            routing = _understand(block, parts, path, tokens, before, scales)
            _exchange(block, routing)
            after = _as_tuple(block(tokens))
        _check_same(before, after, path, _tolerance(block))
        _check_gradients(block, parts, path, tokens)
    return routing


def _exchange(block: nn.Module, routing: _Routing) -> None:
    """Give the block, its router and its experts the classes of this module, on top of their own."""
    parts = routing.parts
    _put(getattr(block, parts.router), routing.router, routing.facts)
    getattr(block, parts.experts).__class__ = IndexedExperts
    _put(block, RoutedBlock, {"parts": parts, "returns_logits": routing.returns_logits})


def _put(module: nn.Module, readable: type, facts: dict[str, Any]) -> None:
    own = type(module)
    module.__class__ = type(own.__name__, (readable, own), {"__module__": own.__module__, **facts})


def _understand(
    block: nn.Module, parts: _Parts, path: str, tokens: Tensor, before: tuple[Any, ...], scales: Sequence[float]
) -> _Routing:
    """Which way of routing reproduces the block's output `before` [1, token, d_model] on `tokens`."""
    hidden, output = tokens[0], before[0][0].float()
    shared = getattr(block, parts.shared)(hidden).float() if parts.shared else torch.zeros_like(output)
    each = torch.stack([expert(hidden).float() for expert in getattr(block, parts.experts)])  # [expert, token, d_model]
    try:
        decided = getattr(block, parts.router)(tokens)
    except MODEL_CRASHES as error:
        raise MoELensError(
            f"the router {parts.router!r} of {path!r} cannot be called with [batch, pos, d_model]: {error}"
        ) from error

    def scale_for(indices: Tensor, weights: Tensor) -> float | None:
        """What the experts' outputs under `indices` and `weights` [token, k] must be multiplied by, None if no use."""
        gates = output.new_zeros(len(hidden), len(each)).scatter(-1, indices, weights.float())
        mixed = torch.einsum("te,etd->td", gates, each)
        return next((s for s in scales if _error(shared + s * mixed, output) <= _tolerance(block)), None)

    found = (
        _scoring(decided[0], scale_for) if isinstance(decided, Tensor) else _choosing(decided, path, parts, scale_for)
    )
    if len(found) != 1:
        raise MoELensError(
            f"{len(found) or 'no'} known ways of routing reproduce the output of {path!r}; expected exactly one of "
            "softmax or sigmoid, top-k, renormalised or not, times a scale that the config states, plus shared experts"
        )
    return _Routing(parts, len(before) == 2, *found[0])


ScaleFor = Callable[[Tensor, Tensor], float | None]


def _scoring(logits: Tensor, scale_for: ScaleFor) -> list[tuple[type, dict[str, Any]]]:
    """All rules that turn `logits` [token, expert] into the choice that the block makes."""
    found = []
    for score in SCORES:
        for renormalizes in (False, True):
            rule = ScoringRule(score, renormalizes)
            for k in range(1, min(logits.shape[-1], MOST_SELECTED) + 1):
                indices = SCORES[score](logits).topk(k, dim=-1).indices
                scale = scale_for(indices, rule.weights(logits, indices))
                if scale is not None:
                    found.append((ScoringRouter, {"rule": replace(rule, scale=scale), "top_k": k}))
    one_weight = [facts for _, facts in found if facts["top_k"] == 1 and facts["rule"].renormalizes]
    return found[:1] if len(one_weight) == len(found) else found  # one weight over itself is 1 by either score


def _choosing(decided: Any, path: str, parts: _Parts, scale_for: ScaleFor) -> list[tuple[type, dict[str, Any]]]:
    """The router's own choice, if the block uses it."""
    choice = _choice(decided)
    if choice is None:
        raise MoELensError(
            f"the router {parts.router!r} of {path!r} returns {type(decided).__name__}; expected logits, or the "
            "selected experts and their gating weights [token, k]"
        )
    scale = scale_for(*choice)
    return [] if scale is None else [(ChoosingRouter, {"scale": scale})]


def _choice(decided: Any) -> tuple[Tensor, Tensor] | None:
    """Selected experts and gating weights [token, k] in what a router returned, None without them."""
    tensors = [part for part in _as_tuple(decided) if isinstance(part, Tensor) and part.ndim == 2]
    indices = [part for part in tensors if not part.is_floating_point()]
    weights = [part for part in tensors if part.is_floating_point() and indices and part.shape == indices[0].shape]
    return (indices[0], weights[0]) if len(indices) == 1 and len(weights) == 1 else None


def _probe(block: nn.Module, parts: _Parts) -> Tensor:
    """Random tokens [1, token, d_model] of several lengths: short ones are scored nearly alike, long ones are not."""
    weight = getattr(block, parts.router).weight
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(1, PROBE_TOKENS, weight.shape[1], generator=generator)
    lengths = torch.logspace(-1, 0.5, PROBE_TOKENS)[:, None]
    return (directions * lengths).to(weight.device, next(getattr(block, parts.experts).parameters()).dtype)


def _check_same(before: tuple[Any, ...], after: tuple[Any, ...], path: str, tolerance: float) -> None:
    shapes = [[list(part.shape) for part in parts if isinstance(part, Tensor)] for parts in (before, after)]
    if len(before) != len(after) or shapes[0] != shapes[1]:
        raise MoELensError(
            f"{path!r} returns {len(before)} values with shapes {shapes[0]}; expected its output, and at most the "
            "router logits [token, expert] beside it"
        )
    errors = [_error(new.float(), old.float()) for old, new in zip(before, after, strict=True)]
    far = [error for error in errors if not error <= tolerance]  # NaN too
    if far:
        raise MoELensError(f"the output of {path!r} is not reproduced: relative error {max(far):.1e}")


def _check_gradients(block: nn.Module, parts: _Parts, path: str, tokens: Tensor) -> None:
    """MoELensError unless the block's output has gradients to the router and to an expert that was selected."""
    with torch.no_grad():
        _, _, indices = getattr(block, parts.router)(tokens[0])
    expert = f"{parts.experts}.{indices[0, 0].item()}"
    names = [f"{parts.router}.weight"]
    names += [f"{expert}.{name}" for name, weight in block.get_submodule(expert).named_parameters() if weight.ndim > 1]
    leaves = {name: block.get_parameter(name).detach().clone().requires_grad_() for name in names}
    with torch.enable_grad():
        output = _as_tuple(torch.func.functional_call(block, leaves, (tokens,)))[0]
        gradients = torch.autograd.grad(output.float().square().sum(), list(leaves.values()), allow_unused=True)
    missing = [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]
    if missing:
        raise MoELensError(f"no gradients reach {', '.join(missing)} of {path!r}, which its code computes without them")


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest difference within a token, relative to the token's largest value; [..., token, d_model]."""
    return ((found - expected).abs().amax(-1) / expected.abs().amax(-1)).max().item()


def _tolerance(block: nn.Module) -> float:
    return TOLERANCE.get(next(block.parameters()).dtype, HALF_TOLERANCE)


def _scales(model: nn.Module) -> tuple[float, ...]:
    """The numbers that the model's config calls a scale."""
    config = model.config.to_dict() if hasattr(model, "config") else {}
    numbers = {name: value for name, value in config.items() if isinstance(value, int | float)}
    return tuple(float(value) for name, value in numbers.items() if "scal" in name and value > 0)


def _on_meta(block: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in block.parameters())


def _with_random_weights(block: nn.Module) -> nn.Module:
    """A copy on the CPU in float32, with random weights."""
    copied = copy.deepcopy(block).to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*copied.parameters(), *copied.buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(generator=generator).div_(max(1, tensor.shape[-1]) ** 0.5)
    return copied


def _as_tuple(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)


@contextmanager
def _crashes_explained(path: str) -> Iterator[None]:
    """Inside the block, what the code of the model's module at `path` raises becomes a MoELensError."""
    try:
        yield
    except MoELensError:
        raise
    except MODEL_CRASHES as crash:
        raise MoELensError(
            f"{path!r} cannot be called with hidden states [batch, pos, d_model] alone: {type(crash).__name__}: {crash}"
        ) from crash


@contextmanager
def _evaluating(block: nn.Module) -> Iterator[None]:
    """Inside the block, evaluation mode; afterwards each module's own mode again."""
    modes = {module: module.training for module in block.modules()}
    block.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
