"""A model that runs out of memory, as a full accelerator does, for batches of more than so many rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def out_of_memory_beyond(rows: int, module: nn.Module) -> Iterator[list[int]]:
    """Inside the block the embedding of `module` refuses more texts; gives how many were tried each time.

    Single tokens, as the logit lens gives them, are no texts.
    """
    tried: list[int] = []

    def refuse(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        count, width = arguments[0].shape
        tried.append(count)
        if count > rows and width > 1:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    handle = module.get_input_embeddings().register_forward_pre_hook(refuse)
    try:
        yield tried
    finally:
        handle.remove()


@contextmanager
def out_of_memory_backward_beyond(rows: int, layer: nn.Module) -> Iterator[None]:
    """Inside the block gradients of more rows stop at `layer`, when those of the layers after it were added up."""

    def fail(_: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    def refuse(_: nn.Module, arguments: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if len(hidden) > rows and hidden.requires_grad:
            hidden.register_hook(fail)

    handle = layer.register_forward_hook(refuse)
    try:
        yield
    finally:
        handle.remove()
