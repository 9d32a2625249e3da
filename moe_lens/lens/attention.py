"""Attention of chosen query positions only, so that no map of all positions by all positions is stored."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moe_lens.architecture.discovery import pretrained
from moe_lens.errors import MoELensError
from moe_lens.lens.devices import OnDevices

IMPLEMENTATIONS = ("sdpa", "eager")


@contextmanager
def attention_rows(model: nn.Module, rows: Sequence[int] | Tensor) -> Iterator[None]:
    """Inside the block each attention module returns, as its second output, the attention of `rows` only.

    rows: query positions, int [row]; negative ones count from the end. The second output is then
        [batch, head, row, pos]. The first output stays that of the model's own implementation, bit for bit.

    The rows are computed by the model family's own eager attention, so grouped heads, windows and biases
    are treated as it treats them. The entry in transformers' table of attention functions is replaced under
    its own name, because some families branch on that name. Raises MoELensError for a model that runs neither
    sdpa nor eager attention.
    """
    places = rows.tolist() if isinstance(rows, Tensor) else [int(row) for row in rows]
    name = pretrained(model).config._attn_implementation
    if name not in IMPLEMENTATIONS:
        raise MoELensError(
            f"attention can be recorded with the {' or '.join(IMPLEMENTATIONS)} implementation; this model "
            f"runs {name!r}: load it with attn_implementation='sdpa'"
        )
    outer = ALL_ATTENTION_FUNCTIONS.get(name)
    ALL_ATTENTION_FUNCTIONS[name] = _RowsAttention(places, outer)
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]  # the library's own entry, if it has one, shows again
        if ALL_ATTENTION_FUNCTIONS.get(name) is not outer:  # an outer block's, or the user's
            ALL_ATTENTION_FUNCTIONS[name] = outer


class _RowsAttention:
    """An attention function: outputs as `implementation` makes them, weights of the chosen rows only."""

    def __init__(self, rows: list[int], implementation: Callable[..., Any] | None) -> None:
        self._rows = rows
        self._implementation = implementation
        self._places: dict[int, OnDevices] = {}  # by the number of queries

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """Attention output [batch, pos, head, d_head] and weights [batch, head, row, pos]."""
        eager = _eager_attention(module)
        implementation = self._implementation or eager
        output, _ = implementation(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
        n_queries = query.shape[2]
        rows = self._among(n_queries).on(query.device)
        mask = _additive_mask(attention_mask, rows, query, key.shape[2])
        by_query = ((n_queries, key.shape[2]), (n_queries, 1))
        options = {  # a bias of each query and key, and a sink of each query, as Inkling's, have rows of queries too
            name: option[:, :, rows] if isinstance(option, Tensor) and option.shape[2:] in by_query else option
            for name, option in options.items()
        }
        _, weights = eager(module, query[:, :, rows], key, value, mask, scaling=scaling, dropout=0.0, **options)
        return output, weights

    def _among(self, n_queries: int) -> OnDevices:
        """The rows as places among so many queries, int64 [row]."""
        if n_queries not in self._places:
            if not all(-n_queries <= row < n_queries for row in self._rows):
                raise MoELensError(f"attention rows must be among the {n_queries} positions; got {self._rows}")
            places = [row % n_queries for row in self._rows]
            self._places[n_queries] = OnDevices(torch.tensor(places, dtype=torch.int64))
        return self._places[n_queries]


def _eager_attention(module: nn.Module) -> Callable[..., Any]:
    eager: Callable[..., Any] | None = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise MoELensError(
            f"{type(module).__name__} brings no eager attention function to compute attention rows with; "
            "leave 'attention' out of what is captured"
        )
    return eager


def _additive_mask(mask: Tensor | None, rows: Tensor, query: Tensor, n_keys: int) -> Tensor:
    """The mask of the given query rows as numbers to add to the scores, [batch or 1, 1, row, pos].

    mask: bool or additive [batch, 1, query, pos]; None stands for plain causal attention.
    """
    lowest = torch.finfo(query.dtype).min
    if mask is None:
        last_seen = rows + n_keys - query.shape[2]  # queries are the last ones of the keys' positions
        seen = torch.arange(n_keys, device=rows.device) <= last_seen[:, None]
        mask = seen[None, None]
    else:
        mask = mask[:, :, rows]
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
    return mask
