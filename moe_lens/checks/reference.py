"""What a check compares with: the bare model under plain torch hooks or changed weights, without any tracing."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.architecture import MoELayer
from moe_lens.experts import ExpertSet
from moe_lens.lens import MoELens

Edit = Callable[[Tensor, Tensor], Tensor]
"""Gating weights [token, k] and whether their experts are in the set [token, k] to other gating weights."""


def padded(lens: MoELens, texts: Sequence[str]) -> dict[str, Tensor]:
    """What the bare model takes for these texts: left-padded ids and mask, positions from each first token."""
    rows = [lens.tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows))
    pad = lens.tokenizer.pad_token_id or 0
    device = lens.module.device
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {
        "input_ids": torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }


def bare_logits(lens: MoELens, texts: Sequence[str]) -> Tensor:
    """The bare model's logits at every position, [batch, pos, vocab]."""
    with torch.no_grad():
        return lens.module(**padded(lens, texts), use_cache=False).logits


@contextmanager
def watching(module: nn.Module, paths: Sequence[str], side: str) -> Iterator[dict[str, Any]]:
    """Inside the block the last `inputs` or `output` of each module at these paths is kept, by path."""
    seen: dict[str, Any] = {}

    def keep(path: str) -> Callable:
        def hook(_: nn.Module, arguments: tuple, named: dict, *output: Any) -> None:
            seen[path] = output[0] if output else (arguments, named)

        return hook

    modules = {path: module.get_submodule(path) for path in paths}
    register = "register_forward_pre_hook" if side == "inputs" else "register_forward_hook"
    handles = [getattr(found, register)(keep(path), with_kwargs=True) for path, found in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def edited_gating(lens: MoELens, experts: ExpertSet, edit: Edit) -> Iterator[None]:
    """Inside the block the gating weights of every layer in `experts` are edited by a torch hook."""
    handles = []

    def hook_on(site: MoELayer) -> Callable:
        chosen = torch.tensor(experts[site.layer])

        def edited(call: Any) -> Any:
            indices, weights = site.gating(call)
            return site.with_gating(call, indices, edit(weights, torch.isin(indices, chosen.to(indices.device))))

        if site.gating_side == "inputs":
            return lambda _, arguments, named: edited((arguments, named))
        return lambda _, arguments, named, output: edited(output)

    for layer in experts.layers:
        site = lens.architecture.at(layer)
        module = lens.module.get_submodule(site.gating_module)
        register = "register_forward_pre_hook" if site.gating_side == "inputs" else "register_forward_hook"
        handles.append(getattr(module, register)(hook_on(site), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def zeroed(weights: Tensor, hit: Tensor) -> Tensor:
    """Weights of 0 where `hit`."""
    return weights * ~hit


def rescaled(weights: Tensor, hit: Tensor) -> Tensor:
    """Weights of 0 where `hit`, the others times old sum by new sum, all 0 where no other is left."""
    rest = weights * ~hit
    factor = weights.sum(-1, keepdim=True) / rest.sum(-1, keepdim=True)
    return torch.where(hit.all(-1, keepdim=True), torch.zeros_like(rest), rest * factor)


@contextmanager
def without_last_weights(lens: MoELens, experts: ExpertSet) -> Iterator[None]:
    """Inside the block the last weights and biases of these experts are zero."""
    saved = []
    for layer in experts.layers:
        weights = lens.architecture.at(layer).output_weights(lens.module)
        for weight in [weight for expert in experts[layer] for weight in weights[expert]]:
            saved.append((weight, weight.clone()))
            weight.zero_()
    try:
        yield
    finally:
        for weight, old in saved:
            weight.copy_(old)


@contextmanager
def deleted(lens: MoELens, experts: ExpertSet) -> Iterator[None]:
    """Inside the block each layer's router is one that has no rows for these experts, as if they were deleted.

    Its choice among the others is given back in their old numbers, to the experts as they are.
    """
    handles = []
    for layer in experts.layers:
        site = lens.architecture.at(layer)
        n = site.observed.n_experts
        kept = [expert for expert in range(n) if expert not in experts[layer]]
        router = lens.module.get_submodule(site.router)
        smaller = _smaller(router, n, site.observed.map_width, kept)
        handles.append(router.register_forward_hook(_replacing(site, smaller, kept), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _smaller(router: nn.Module, n: int, width: int, kept: list[int]) -> nn.Module:
    """A copy of the router with the rows `kept` of all that has one per expert, and the right counts."""
    router = copy.deepcopy(router)
    router._forward_hooks, router._forward_pre_hooks = {}, {}
    router.__dict__.pop("forward", None)  # a tracing library's
    for child in router.modules():
        for held in (child._parameters, child._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    smaller = _rows(tensor, n, width, kept)
                    held[name] = nn.Parameter(smaller, requires_grad=False) if held is child._parameters else smaller
        for holder in (child, getattr(child, "config", None)):
            _lower_counts(holder, n, len(kept))
    return router


def _rows(tensor: Tensor, n: int, width: int, kept: list[int]) -> Tensor:
    tensor = tensor.detach()
    for axis, size in enumerate(tensor.shape):
        if size in (n, width) and (axis == 0 or tensor.shape[0] == 1):
            places = [*kept, *range(n, size)]
            return tensor.index_select(axis, torch.tensor(places, device=tensor.device))
    return tensor


def _lower_counts(holder: Any, n: int, left: int) -> None:
    """Counts of experts among the attributes: n, or some more or less by what is no routed expert, by as many lower."""
    for name, value in list(vars(holder).items()) if holder is not None else []:
        if ("expert" in name or "classes" in name) and type(value) is int and n - 1 <= value <= n + 1 and value > 2:
            setattr(holder, name, value - n + left)


def _replacing(site: MoELayer, smaller: nn.Module, kept: list[int]) -> Callable:
    n = site.observed.n_experts

    def full(values: Tensor, fill: float) -> Tensor:
        spread = torch.full((*values.shape[:-1], n), fill, dtype=values.dtype, device=values.device)
        spread[..., kept] = values
        return spread

    def hook(_: nn.Module, arguments: tuple, named: dict, output: Any) -> Any:
        arguments = [_of_kept(argument, n, kept) for argument in arguments]
        named = {name: _of_kept(value, n, kept) for name, value in named.items()}
        return site.renumbered(smaller(*arguments, **named), full, torch.tensor(kept))

    return hook


def _of_kept(argument: Any, n: int, kept: list[int]) -> Any:
    """An argument with one number per expert, without those deleted; any other as it is."""
    return argument[kept] if isinstance(argument, Tensor) and argument.shape == (n,) else argument
