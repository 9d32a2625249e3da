"""What a check compares with: the bare model under plain torch hooks or changed weights, without any tracing."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.architecture import MoELayer
from moe_lens.architecture.discovery import pretrained
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens.lens import MoELens

Edit = Callable[[Tensor, Tensor], Tensor]
"""Gating weights [token, k] and whether their experts are in the set [token, k] to other gating weights."""


def padded(lens: MoELens, texts: Sequence[str]) -> dict[str, Tensor]:
    """What the bare model takes for these texts: left-padded ids, mask and positions, all [batch, pos].

    Raises MoELensError for a text without tokens.
    """
    rows = [lens.tokenizer(text)["input_ids"] for text in texts]
    empty = [i for i, row in enumerate(rows) if not row]
    if empty:
        raise MoELensError(f"text {empty[0]} has no tokens; expected texts of one token or more")
    width = max(map(len, rows))
    pad = lens.tokenizer.pad_token_id or 0
    device = pretrained(lens.module).device
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {
        "input_ids": torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }


def bare_logits(lens: MoELens, texts: Sequence[str]) -> Tensor:
    """The bare model's logits at every position, [batch, pos, vocab]."""
    with torch.no_grad():
        logits: Tensor = lens.module(**padded(lens, texts), use_cache=False).logits
    return logits


@contextmanager
def watching(module: nn.Module, paths: Sequence[str], side: str) -> Iterator[dict[str, Any]]:
    """Inside the block the last `inputs` or `output` of each module at these paths is kept, by path."""
    seen: dict[str, Any] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], *output: Any) -> None:
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
def given_streams(module: nn.Module, streams: Mapping[str, Any]) -> Iterator[None]:
    """Inside the block each module takes the first argument of the call in `streams`, by path, for its own."""

    def hook_on(path: str) -> Callable[..., Any]:
        (first, *_), _ = streams[path]
        return lambda _, arguments, named: ((first, *arguments[1:]), named)

    layers = {path: module.get_submodule(path) for path, (arguments, _) in streams.items() if arguments}
    handles = [layer.register_forward_pre_hook(hook_on(path), with_kwargs=True) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def edited_gating(lens: MoELens, experts: ExpertSet, edit: Edit) -> Iterator[None]:
    """Inside the block the gating weights of every layer in `experts` are edited by a torch hook."""
    handles = []

    def hook_on(site: MoELayer) -> Callable[..., Any]:
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
    """Weights [token, k] of 0 where `hit` [token, k]."""
    return weights * ~hit


def rescaled(weights: Tensor, hit: Tensor) -> Tensor:
    """Weights [token, k] of 0 where `hit` [token, k], the others times old by new sum, all 0 where no other is left."""
    rest = weights * ~hit
    factor = weights.sum(-1, keepdim=True) / rest.sum(-1, keepdim=True)
    return torch.where(hit.all(-1, keepdim=True), torch.zeros_like(rest), rest * factor)


@contextmanager
def without_last_weights(lens: MoELens, experts: ExpertSet) -> Iterator[None]:
    """Inside the block the last weights and biases of these experts are zero."""
    saved = []
    try:
        for layer in experts.layers:
            weights = lens.architecture.at(layer).output_weights(lens.module)
            for weight in [weight for expert in experts[layer] for weight in weights[expert]]:
                saved.append((weight, weight.clone()))
                weight.zero_()
        yield
    finally:
        for weight, old in saved:
            weight.copy_(old)
