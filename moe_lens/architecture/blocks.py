"""What an MoE block does to its experts' outputs, seen by calling its own code with stand-ins for its children."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.architecture.moe_layer import Moment
from moe_lens.architecture.router_probe import PROBE_TOKENS
from moe_lens.errors import MODEL_CRASHES, MoELensError

TOLERANCE = 1e-5
WIDE_OPEN = 30.0
"""A logit at which a sigmoid lets everything through."""


@dataclass(frozen=True)
class SharedPath:
    """How shared experts' output gets into a block's: times `scale`, and times the sigmoid of what child `gate` says.

    moment: when the shared experts run.
    """

    scale: float
    gate: str | None
    moment: Moment


class BlockProbe:
    """A block called with stand-ins for its children: random numbers for one, 0 for the others and for its own weights.

    It may be on any device, also meta; no weight is read.
    path: names the block in errors. router, experts: its children's names. routed: what the router gives.
    """

    def __init__(self, block: nn.Module, path: str, *, router: str, experts: str, routed: Any, d_model: int) -> None:
        self._block, self._path, self._router, self._experts, self._routed = block, path, router, experts, routed
        self._given = torch.randn(PROBE_TOKENS, d_model, generator=torch.Generator().manual_seed(0))

    def after_experts(self) -> tuple[float, tuple[str, ...]]:
        """What the routed experts' output is multiplied by, and the children that it is sent through after that.

        What is shared is not scaled by the factor. Raises MoELensError for a block that cannot be called with hidden
        states alone, or that does more to its experts' output than scaling it.
        """
        call = _Call(self._given, self._experts, {})
        factor = self._factor(call)
        if factor is None:
            raise MoELensError(
                f"{self._path!r} does more to its experts' output than scaling it; expected a constant factor"
            )
        return factor, tuple(call.passed)

    def shared(self, name: str) -> SharedPath | None:
        """How the output of child `name`, the shared experts, gets into the block's; None where that cannot be told."""
        call = _Call(self._given, name, {})
        scale, gate = self._factor(call), None
        others = [child for child in dict.fromkeys(call.order) if child not in (self._router, self._experts, name)]
        for child in others:
            opened = self._factor(_Call(self._given, name, {child: WIDE_OPEN}))
            if opened is not None and opened != scale:
                scale, gate = opened, child
        if scale is None or name not in call.order:
            return None
        place = call.order.index(name)
        moment = Moment.AFTER_EXPERTS
        if place < call.order.index(self._router):
            moment = Moment.BEFORE_ROUTER
        elif place < call.order.index(self._experts):
            moment = Moment.BEFORE_EXPERTS
        return SharedPath(scale, gate, moment)

    def _factor(self, call: "_Call") -> float | None:
        """What the block multiplies the numbers by that one child gives in this call; None where no number will do."""
        block = self._block
        stand_in = copy.copy(block)
        stand_in._parameters = {name: _zeros(tensor) for name, tensor in block._parameters.items()}
        stand_in._buffers = {name: _zeros(tensor) for name, tensor in block._buffers.items()}
        stand_in._modules = {
            name: _giving(child, call.output_of(name, child)) for name, child in block._modules.items()
        }
        stand_in._modules[self._router] = _giving(block._modules[self._router], call.router(self._router, self._routed))
        try:
            with torch.no_grad():
                hidden = torch.ones(1, *self._given.shape)
                output = type(block).forward(stand_in, hidden, **_further(block))
        except MODEL_CRASHES as error:
            raise MoELensError(
                f"{self._path!r} cannot be called with hidden states [batch, pos, d_model] alone, so what it does to "
                f"its experts' output is not known: {error}"
            ) from error
        return _factor_of(output[0] if isinstance(output, tuple) else output, self._given)


class _Call:
    """One call of a block: which child gives the random numbers, which give a constant, and what was called."""

    def __init__(self, given: Tensor, giver: str, constants: dict[str, float]) -> None:
        self._given, self._giver, self._constants = given, giver, constants
        self.order: list[str] = []
        self.passed: list[str] = []

    def router(self, name: str, routed: Any) -> Callable[..., Any]:
        def output(*call: Any, **named: Any) -> Any:
            self.order.append(name)
            return routed

        return output

    def output_of(self, name: str, child: nn.Module | None) -> Callable[..., Any]:
        def output(x: Tensor, *call: Any, **named: Any) -> Tensor:
            self.order.append(name)
            if name == self._giver:
                rest = self._given.new_zeros(max(0, x.numel() - self._given.numel()))  # of experts that all see every
                return torch.cat([self._given.flatten(), rest]).view(x.shape)  # token
            if x.numel() == self._given.numel() and x.any() and _factor_of(x, self._given) is not None:
                if not isinstance(child, nn.Identity):
                    self.passed.append(name)
                return x
            return torch.full_like(x, self._constants.get(name, 0.0))

        return output


def _factor_of(output: Tensor, given: Tensor) -> float | None:
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
