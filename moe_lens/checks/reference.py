"""What a check compares with: the bare model under plain torch hooks or changed weights, without any tracing."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from moe_lens.architecture import MoELayer
from moe_lens.architecture.discovery import pretrained
from moe_lens.architecture.router_probe import named_tensors
from moe_lens.data.offsets import token_ids
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens.holding import measuring
from moe_lens.lens.lens import MoELens
from moe_lens.lens.offloaded import expect_in_memory
from moe_lens.lens.reader import TraceReader
from moe_lens.lens.taken import pad_id

Edit = Callable[[Tensor, Tensor], Tensor]
"""Gating weights [token, k] and whether their experts are in the set [token, k] to other gating weights."""


def padded(lens: MoELens, texts: Sequence[str]) -> dict[str, Tensor]:
    """What the bare model takes for these texts: left-padded ids, mask and positions, all [batch, pos].

    Raises MoELensError for a text without tokens.
    """
    rows = [token_ids(text, lens.tokenizer, add_special_tokens=True) for text in texts]
    empty = [i for i, row in enumerate(rows) if not row]
    if empty:
        raise MoELensError(f"text {empty[0]} has no tokens; expected texts of one token or more")
    width = max(map(len, rows))
    pad = pad_id(lens.module, lens.tokenizer)
    device = pretrained(lens.module).device
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {
        "input_ids": torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }


def bare_logits(lens: MoELens, texts: Sequence[str]) -> Tensor:
    """The bare model's logits at every position, [batch, pos, vocab]."""
    with torch.no_grad(), measuring(lens.module):
        logits: Tensor = lens.module(**padded(lens, texts), use_cache=False).logits
    return logits


@contextmanager
def watching(module: nn.Module, paths: Sequence[str], side: str) -> Iterator[dict[str, Any]]:
    """Inside the block the last `inputs` or `output` of each module at these paths is kept, by path."""
    seen: dict[str, Any] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], *output: Any) -> None:
            seen[path] = _copied(output[0]) if output else (_copied(arguments), _copied(named))

        return hook

    modules = {path: module.get_submodule(path) for path in paths}
    register = "register_forward_pre_hook" if side == "inputs" else "register_forward_hook"
    handles = [getattr(found, register)(keep(path), with_kwargs=True) for path, found in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _copied(value: Any) -> Any:
    """A copy of what a module got or gave: what follows it may write into its tensors."""
    match value:
        case Tensor():
            return value.clone()
        case tuple():
            return tuple(map(_copied, value))
        case dict():
            return {name: _copied(inner) for name, inner in value.items()}
        case _:
            return value


@contextmanager
def watched(lens: MoELens) -> Iterator[Callable[[int], TraceReader]]:
    """Inside the block the last call of every module that a lens reads is kept by torch hooks.

    Afterwards what it gives reads these calls as the lens reads a trace: a reader, for the number of rows in the batch.
    """
    architecture = lens.architecture
    parts: list[str | None] = [*architecture.layers]
    for site in architecture.moe:
        parts += [site.router, site.experts, site.gating_module, site.outputs_module, site.experts.rpartition(".")[0]]
        parts += [site.shared_experts, site.shared_gate]
    paths = [path for path in dict.fromkeys(parts) if path]
    calls = {path: _Call(lens.module.get_submodule(path)) for path in paths}

    def reader(rows: int) -> TraceReader:
        batcher = SimpleNamespace(total=rows, batching=False)
        model = SimpleNamespace(get=calls.__getitem__, interleaver=SimpleNamespace(batcher=batcher))
        return TraceReader(model, architecture)

    with watching(lens.module, paths, "inputs") as inputs, watching(lens.module, paths, "output") as outputs:
        yield reader
    for path, call in calls.items():
        call.inputs, call.output = inputs.get(path), outputs.get(path)


@dataclass
class _Call:
    """The last call of a module, as a trace shows it."""

    module: nn.Module
    inputs: Any = None
    output: Any = None

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        with torch.no_grad():
            return self.module(*arguments, **named)


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
    left = rest.sum(-1, keepdim=True)  # 0 also of a token that skips the experts
    return torch.where(left == 0, torch.zeros_like(rest), rest * (weights.sum(-1, keepdim=True) / left))


def expect_weights(module: nn.Module, path: str) -> None:
    """MoELensError for a part of the model whose weights are not in memory, so that changing them would do nothing."""
    names = [f"{path}.{name}" for name, _ in module.get_submodule(path).named_parameters()]
    expect_in_memory(module, names, "this check changes its values")


@contextmanager
def without_last_weights(lens: MoELens, experts: ExpertSet) -> Iterator[None]:
    """Inside the block the last weights and biases of these experts, which have to be in memory, are zero."""
    saved = []
    try:
        for layer in experts.layers:
            expect_weights(lens.module, lens.architecture.at(layer).experts)
            weights = lens.architecture.at(layer).output_weights(lens.module)
            for weight in [weight for expert in experts[layer] for weight in weights[expert]]:
                saved.append((weight, weight.clone()))
                weight.zero_()
        yield
    finally:
        for weight, old in saved:
            weight.copy_(old)


@contextmanager
def given_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block these parameters and buffers, which have to be in memory, have other values."""
    expect_in_memory(module, list(tensors), "this check changes its values")
    own = dict(named_tensors(module))
    before = {path: own[path].detach().clone() for path in tensors}
    try:
        with torch.no_grad():
            for path, values in tensors.items():
                own[path].copy_(values)
        yield
    finally:
        with torch.no_grad():
            for path, values in before.items():
                own[path].copy_(values)


@contextmanager
def biased_maps(lens: MoELens, experts: ExpertSet, alpha: float) -> Iterator[None]:
    """Inside the block `alpha` is added to what the routers' linear maps give for these experts, whoever calls them."""
    added: dict[int, Tensor] = {}
    running: list[int] = []
    handles = []
    for layer in experts.layers:
        site = lens.architecture.at(layer)
        observed, router = site.observed, lens.module.get_submodule(site.router)
        chosen = torch.isin(torch.arange(observed.map_width), torch.tensor(experts[layer]))
        added[layer] = chosen * (alpha / observed.map_factor)
        handles.append(router.register_forward_pre_hook(lambda *_, own=layer: running.append(own)))
        handles.append(router.register_forward_hook(lambda *_: running.clear()))
    try:
        with _AddedToMaps(added, running):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _AddedToMaps(TorchFunctionMode):
    """Adds numbers to the output of linear maps while the router of a layer runs, the last one in `running`."""

    def __init__(self, added: Mapping[int, Tensor], running: Sequence[int]) -> None:
        super().__init__()
        self._added, self._running = added, running

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        if function is not functional.linear or not self._running:
            return output
        added = self._added[self._running[-1]]
        return output + added.to(output) if output.shape[-1] == len(added) else output


@contextmanager
def given_output(module: nn.Module, path: str, output: Any, mask: Tensor) -> Iterator[None]:
    """Inside the block the module at `path` gives `output`, or its first part, where `mask`, bool [batch, pos]."""

    def hook(_: nn.Module, arguments: Any, own: Any) -> Any:
        old, new = (value[0] if isinstance(value, tuple) else value for value in (own, output))
        mixed = torch.where(mask.view(*mask.shape, *[1] * (old.ndim - 2)), new, old)
        return (mixed, *own[1:]) if isinstance(own, tuple) else mixed

    handle = module.get_submodule(path).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
