"""What an MoE block does to its experts' output, seen by calling its own code with stand-ins for its children."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.architecture.router_probe import PROBE_TOKENS
from moe_lens.errors import MODEL_CRASHES, MoELensError

TOLERANCE = 1e-5


def after_experts(
    block: nn.Module, path: str, *, router: str, experts: str, routed: Any, d_model: int
) -> tuple[float, tuple[str, ...]]:
    """What `block` does to the output of its child `experts`: multiplies it by a factor, sends it through children.

    The factor counts before such children, and what is shared is not scaled by it. The block is called with a router,
    its child `router`, that gives `routed`, experts that give random numbers, and 0 for all else, also for the block's
    own parameters; so it may be on any device, also meta, and no weight is read.
    Raises MoELensError for a block that cannot be called so, or that does more to its experts' output than scaling it.
    """
    tokens = PROBE_TOKENS
    given = torch.randn(tokens, d_model, generator=torch.Generator().manual_seed(0))
    passed: list[str] = []

    def experts_output(hidden: Tensor, *call: Any, **named: Any) -> Tensor:
        rest = given.new_zeros(hidden.numel() - given.numel())  # of experts that all see every token
        return torch.cat([given.flatten(), rest]).view(hidden.shape)

    def other_child(name: str) -> Callable[..., Tensor]:
        def output(x: Tensor, *call: Any, **named: Any) -> Tensor:
            if x.numel() == given.numel() and x.any() and _factor(x, given) is not None:
                if not isinstance(block._modules[name], nn.Identity):
                    passed.append(name)
                return x
            return torch.zeros_like(x)

        return output

    stand_in = copy.copy(block)
    stand_in._parameters = {name: _zeros(tensor) for name, tensor in block._parameters.items()}
    stand_in._buffers = {name: _zeros(tensor) for name, tensor in block._buffers.items()}
    stand_in._modules = {name: _giving(child, other_child(name)) for name, child in block._modules.items()}
    stand_in._modules[router] = _giving(block._modules[router], lambda *call, **named: routed)
    stand_in._modules[experts] = _giving(block._modules[experts], experts_output)
    try:
        with torch.no_grad():
            output = type(block).forward(stand_in, torch.ones(1, tokens, d_model), **_further(block))
    except MODEL_CRASHES as error:
        raise MoELensError(
            f"{path!r} cannot be called with hidden states [batch, pos, d_model] alone, so what it does to its "
            f"experts' output is not known: {error}"
        ) from error
    factor = _factor(output[0] if isinstance(output, tuple) else output, given)
    if factor is None:
        raise MoELensError(f"{path!r} does more to its experts' output than scaling it; expected a constant factor")
    return factor, tuple(passed)


def _factor(output: Tensor, given: Tensor) -> float | None:
    """The number by which `given` must be multiplied to be `output`; None where none will do."""
    output = output.reshape(given.shape).float()
    factor = ((output * given).sum() / given.square().sum()).item()
    close = (output - factor * given).abs().max() <= TOLERANCE * max(1.0, abs(factor))
    return round(factor, 4) if close else None


def _giving(child: nn.Module | None, forward: Callable[..., Any]) -> nn.Module | None:
    """A stand-in with the attributes of `child` that computes `forward` instead."""
    if child is None:
        return None
    stand_in = copy.copy(child)
    stand_in._forward_hooks, stand_in._forward_pre_hooks = {}, {}
    stand_in.forward = forward
    return stand_in


def _zeros(tensor: Tensor | None) -> nn.Parameter | None:
    if tensor is None:
        return None
    return nn.Parameter(torch.zeros(tensor.shape, dtype=tensor.dtype), requires_grad=False)


def _further(block: nn.Module) -> dict[str, Any]:
    """Arguments besides hidden states: token ids."""
    names = inspect.signature(type(block).forward).parameters
    return {"input_ids": torch.zeros(1, PROBE_TOKENS, dtype=torch.long)} if "input_ids" in names else {}
