"""The proof that a block computes what it did before its classes were exchanged, and that gradients flow in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.architecture.listed.readable import Parts, as_tuple
from moe_lens.errors import MODEL_CRASHES, MoELensError

PROBE_TOKENS = 16
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
HALF_TOLERANCE = 4e-2


def probe(block: nn.Module, parts: Parts) -> Tensor:
    """Random tokens [1, token, d_model] of several lengths: short ones are scored nearly alike, long ones are not."""
    weight = getattr(block, parts.router).weight
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(1, PROBE_TOKENS, weight.shape[1], generator=generator)
    lengths = torch.logspace(-1, 0.5, PROBE_TOKENS)[:, None]
    return (directions * lengths).to(weight.device, next(getattr(block, parts.experts).parameters()).dtype)


def check_same(before: tuple[Any, ...], after: tuple[Any, ...], path: str, tolerance: float) -> None:
    """MoELensError unless what the block at `path` returned before and after agrees in number, shapes and values."""
    shapes = [[list(part.shape) for part in parts if isinstance(part, Tensor)] for parts in (before, after)]
    if len(before) != len(after) or shapes[0] != shapes[1]:
        raise MoELensError(
            f"{path!r} returns {len(before)} values with shapes {shapes[0]}; expected its output, and at most the "
            "router logits [token, expert] beside it"
        )
    errors = [relative_error(new.float(), old.float()) for old, new in zip(before, after, strict=True)]
    far = [error for error in errors if not error <= tolerance]  # NaN too
    if far:
        raise MoELensError(f"the output of {path!r} is not reproduced: relative error {max(far):.1e}")


def check_gradients(block: nn.Module, parts: Parts, path: str, tokens: Tensor) -> None:
    """MoELensError unless the output on tokens [1, token, d_model] has gradients to router and a selected expert."""
    with torch.no_grad():
        _, _, indices = getattr(block, parts.router)(tokens[0])
    expert = f"{parts.experts}.{indices[0, 0].item()}"
    names = [f"{parts.router}.weight"]
    names += [f"{expert}.{name}" for name, weight in block.get_submodule(expert).named_parameters() if weight.ndim > 1]
    leaves = {name: block.get_parameter(name).detach().clone().requires_grad_() for name in names}
    with torch.enable_grad():
        output = as_tuple(torch.func.functional_call(block, leaves, (tokens,)))[0]
        gradients = torch.autograd.grad(output.float().square().sum(), list(leaves.values()), allow_unused=True)
    missing = [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]
    if missing:
        raise MoELensError(f"no gradients reach {', '.join(missing)} of {path!r}, which its code computes without them")


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference within a token, relative to the token's largest value; [..., token, d_model]."""
    return ((found - expected).abs().amax(-1) / expected.abs().amax(-1)).max().item()


def tolerance_of(block: nn.Module) -> float:
    """The largest `relative_error` that rounding explains in the block's dtype."""
    return TOLERANCE.get(next(block.parameters()).dtype, HALF_TOLERANCE)


@contextmanager
def crashes_explained(path: str) -> Iterator[None]:
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
def evaluating(block: nn.Module) -> Iterator[None]:
    """Inside the block, evaluation mode; afterwards each module's own mode again."""
    modes = {module: module.training for module in block.modules()}
    block.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
