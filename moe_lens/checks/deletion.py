"""Experts cut out of a model, to compare masking with: no router rows, biases or weights of theirs, counts lowered."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.checks.reference import expect_experts_in_memory
from moe_lens.experts import ExpertSet
from moe_lens.lens.lens import MoELens


@contextmanager
def deleted(lens: MoELens, experts: ExpertSet) -> Iterator[None]:
    """Inside the block the bare model runs without these experts; the others have the numbers that are then theirs.

    They are taken out when a layer's turn comes and put back after it, so that one layer's weights at most are held
    twice.
    """
    expect_experts_in_memory(lens, experts)
    surgeries = {layer: _Surgery(lens, layer, experts[layer]) for layer in experts.layers}
    handles = []
    for layer, surgery in surgeries.items():
        module = lens.module.get_submodule(lens.architecture.layers[layer])
        handles.append(module.register_forward_pre_hook(lambda *call, own=surgery: own.cut()))
        handles.append(module.register_forward_hook(lambda *call, own=surgery: own.mend()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for surgery in surgeries.values():
            surgery.mend()


class _Surgery:
    """One layer's experts, to be cut out and put back."""

    def __init__(self, lens: MoELens, layer: int, gone: tuple[int, ...]) -> None:
        model, site = lens.module, lens.architecture.at(layer)
        path = site.router.rpartition(".")[0]
        self._block = model.get_submodule(path)
        self._around = []  # what holds the block, up to the decoder layer
        while path != lens.architecture.layers[layer]:
            path = path.rpartition(".")[0]
            self._around.append(model.get_submodule(path))
        self._router, self._experts = model.get_submodule(site.router), model.get_submodule(site.experts)
        self._gone = gone
        # Routers may score more than there are experts with weights: a skip, shared or empty experts.
        self._with_weights = len(site.output_weights(model))
        self._sizes = {site.observed.n_experts, site.observed.map_width, self._with_weights}
        self._undo: list[tuple[Any, str, Any]] = []

    def cut(self) -> None:
        """Take the experts out of the router, the experts' weights and the block's own tensors and counts."""
        for module in self._router.modules():
            self._cut_tensors(module)
        if self._block is not self._experts:
            self._cut_tensors(self._block)
        if isinstance(self._experts, nn.ModuleList):
            left = [expert for i, expert in enumerate(self._experts) if i not in self._gone]
            self._put(vars(self._experts), "_modules", {str(i): expert for i, expert in enumerate(left)})
        else:
            for module in self._experts.modules():
                self._cut_tensors(module, stacked=True)
        modules = {self._block, *self._around, *self._router.modules(), *self._experts.modules()}
        configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
        for holder in [*map(vars, modules), *map(vars, configs.values())]:
            for name in [name for name, value in holder.items() if self._counts_experts(name, value)]:
                self._put(holder, name, holder[name] - len(self._gone))

    def mend(self) -> None:
        """Put everything back that was taken out, if anything was."""
        while self._undo:
            holder, name, old = self._undo.pop()
            holder[name] = old

    def _cut_tensors(self, module: nn.Module, *, stacked: bool = False) -> None:
        for held in (module._parameters, module._buffers):
            for name, tensor in list(held.items()):
                left = None if tensor is None else self._without(tensor.detach(), stacked=stacked)
                if left is not None:
                    is_parameter = held is module._parameters
                    self._put(held, name, nn.Parameter(left, requires_grad=False) if is_parameter else left)

    def _without(self, tensor: Tensor, *, stacked: bool) -> Tensor | None:
        """The tensor without what it has of the experts, None if it has nothing; stacked: [expert * x, ...] counts."""
        if stacked and tensor.ndim == 2 and len(tensor) not in self._sizes and len(tensor) % self._with_weights == 0:
            by_expert = tensor.view(self._with_weights, -1, tensor.shape[-1])
            left = self._without(by_expert, stacked=False)
            return None if left is None else left.flatten(0, 1)
        axis = 1 if tensor.ndim > 1 and len(tensor) == 1 else 0
        if not tensor.ndim or tensor.shape[axis] not in self._sizes:
            return None
        places = [i for i in range(tensor.shape[axis]) if i not in self._gone]
        return tensor.index_select(axis, torch.tensor(places, device=tensor.device))

    def _counts_experts(self, name: str, value: Any) -> bool:
        named = ("expert" in name or "classes" in name) and not any(other in name for other in ("tok", "top", "shared"))
        return named and type(value) is int and value in self._sizes

    def _put(self, holder: dict[str, Any], name: str, value: Any) -> None:
        self._undo.append((holder, name, holder[name]))
        holder[name] = value
