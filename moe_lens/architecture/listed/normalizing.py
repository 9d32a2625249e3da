"""normalize: every block of listed experts in a model understood, exchanged and proven, or the model left as it was."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from moe_lens.architecture.discovery import pretrained
from moe_lens.architecture.listed.proof import (
    check_gradients,
    check_same,
    crashes_explained,
    evaluating,
    probe,
    tolerance_of,
)
from moe_lens.architecture.listed.readable import BlockRouting, Parts, as_tuple, exchange, parts_of, restore
from moe_lens.architecture.listed.understanding import understand
from moe_lens.errors import MoELensError


def normalize(model: nn.Module) -> tuple[str, ...]:
    """Make every block of listed experts in `model` readable, in place, and give back the paths of the blocks.

    A model without such blocks, or whose blocks were made readable before, is left as it is. On the meta device a
    copy of the first block of each class, with random weights, speaks for all of its class.
    Raises MoELensError, leaving `model` as it was, for a block whose output cannot be reproduced.
    """
    scales = (1.0, *_scales(model))
    blocks = [(path, block, parts) for path, block in model.named_modules() if (parts := parts_of(block)) is not None]
    seen: dict[type, BlockRouting] = {}
    try:
        for path, block, parts in blocks:
            own = type(block)
            if not _on_meta(block):
                _make_readable(block, parts, path, scales)
            else:
                if own not in seen:
                    seen[own] = _make_readable(_with_random_weights(block), parts, path, scales)
                exchange(block, seen[own])
    except BaseException:
        for _, block, _ in blocks:
            restore(block)
        raise
    return tuple(path for path, _, _ in blocks)


def _make_readable(block: nn.Module, parts: Parts, path: str, scales: Sequence[float]) -> BlockRouting:
    """Exchange the classes of a block with weights, and prove that it computes what it did; give back how it routes.

    Raises MoELensError, with the classes exchanged or not, for a block whose output cannot be reproduced.
    """
    for module in (block, getattr(block, parts.router), getattr(block, parts.experts)):
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            raise MoELensError(
                f"the forward pass of {path!r} is replaced already, by other than accelerate's hooks; open the model "
                "as it was loaded"
            )
    with evaluating(block), crashes_explained(path):
        tokens = probe(block, parts)
        with torch.no_grad():
            before = as_tuple(block(tokens))
            routing = understand(block, parts, path, tokens, before, scales)
            exchange(block, routing)
            after = as_tuple(block(tokens))
        check_same(before, after, path, tolerance_of(block))
        check_gradients(block, parts, path, tokens)
    return routing


def _scales(model: nn.Module) -> tuple[float, ...]:
    """The numbers that the model's config calls a scale."""
    config = pretrained(model).config.to_dict() if hasattr(model, "config") else {}
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
