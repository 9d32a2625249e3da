"""Single experts' outputs, seen in the model's own run of its experts, so that they need no second one."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATIONS = ("grouped_mm", "batched_mm")
"""Of transformers, those that multiply what all experts put out by the gating weights at once."""
FOLLOWED = ("reshape", "view", "flatten", "unsqueeze", "__getitem__", "index_select", "to")
"""The functions by which these bring the gating weights into the order of the outputs."""


@dataclass
class SingleOutputs:
    """What the selected experts of one layer put out, of the last run of experts that are watched."""

    _watched: frozenset[nn.Module] = frozenset()
    _ran: nn.Module | None = None
    _seen: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)

    @contextmanager
    def watching(self, experts: Iterable[nn.Module]) -> Iterator[None]:
        """Inside the block `of` knows what these experts put out, until others of them have run."""
        outer, self._watched = self._watched, self._watched | frozenset(experts)
        before = {} if outer or not self._watched else {name: ALL_EXPERTS_FUNCTIONS[name] for name in IMPLEMENTATIONS}
        if before:
            for name, implementation in before.items():
                ALL_EXPERTS_FUNCTIONS[name] = partial(self._run, implementation)
        try:
            yield
        finally:
            self._watched = outer
            if not outer:
                self._ran, self._seen = None, []
                for name, implementation in before.items():
                    del ALL_EXPERTS_FUNCTIONS[name]  # the library's own entry shows again
                    if ALL_EXPERTS_FUNCTIONS[name] is not implementation:  # it was the user's
                        ALL_EXPERTS_FUNCTIONS[name] = implementation

    def watches(self, experts: nn.Module) -> bool:
        """Whether these experts are watched; then `of` is asked once they have run."""
        return experts in self._watched

    def of(self, experts: nn.Module, tokens: Tensor | None, k: int) -> Tensor | None:
        """What the selected experts put out in the last run, before their gating weights, [token, k, d_model].

        tokens: int64 [token], None for all. None where the run did not show it, in implementations of other kinds.
        """
        if self._ran is not experts or len(self._seen) != 1:
            return None
        [(outputs, slots)] = self._seen
        place = torch.empty_like(slots)
        place[slots] = torch.arange(len(slots), device=slots.device)
        place = place.view(-1, k)
        wanted = place if tokens is None else place.index_select(0, tokens)
        return outputs.index_select(0, wanted.flatten()).view(*wanted.shape, outputs.shape[-1])

    def _run(
        self,
        implementation: Callable[..., Tensor],
        experts: nn.Module,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        """The implementation's own output, bit for bit, with what it multiplied by the gating weights kept."""
        if experts not in self._watched:
            return implementation(experts, hidden_states, top_k_index, top_k_weights)
        mode = _Following(top_k_weights)
        with mode:
            output = implementation(experts, hidden_states, top_k_index, top_k_weights)
        self._ran, self._seen = experts, mode.weighted
        return output


class _Following(TorchFunctionMode):
    """Follows gating weights [token, k] through what is done to them, to what is multiplied by them.

    weighted: of each multiplication by all of them what they met, [slot, d_model], and their slots, int64 [slot].
    """

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weighted: list[tuple[Tensor, Tensor]] = []
        self._count = weights.numel()
        slots = torch.arange(self._count, device=weights.device).view(weights.shape)
        self._slots = {id(weights): (weights, slots)}  # with the tensor itself, so that no other gets its id

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if name in FOLLOWED and id(args[0]) in self._slots:
            _, slots = self._slots[id(args[0])]
            moved = slots if name == "to" else function(slots, *args[1:], **(kwargs or {}))
            self._slots[id(output)] = output, moved
        elif name == "mul" and id(args[1]) in self._slots:
            _, slots = self._slots[id(args[1])]
            if slots.numel() == self._count and slots.shape == (*args[0].shape[:-1], 1):
                self.weighted.append((args[0], slots.flatten()))
        return output
