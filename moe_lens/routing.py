"""Routing: what a router decided, and the rules that turn logits into gating weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.errors import MoELensError

PROBE_TOKENS = 64

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.float().softmax(-1),
    "sigmoid": lambda logits: logits.float().sigmoid(),
}
"""Score functions over the last axis, [..., expert] -> [..., expert] float32."""


@dataclass(frozen=True, eq=False)
class Routing:
    """What one layer's router decided for a batch.

    logits: router logits, before any softmax, [batch, pos, expert].
    indices: the selected experts, int64 [batch, pos, k].
    weights: their gating weights as the experts get them, [batch, pos, k].
    """

    logits: Tensor
    indices: Tensor
    weights: Tensor

    @property
    def n_experts(self) -> int:
        """Routed experts of the layer."""
        return self.logits.shape[-1]

    def selected(self) -> Tensor:
        """Which experts were selected, bool [batch, pos, expert]."""
        return torch.zeros_like(self.logits, dtype=torch.bool).scatter(-1, self.indices, True)

    def probabilities(self) -> Tensor:
        """Softmax of the logits over all experts, float32 [batch, pos, expert]."""
        return SCORES["softmax"](self.logits)


@dataclass(frozen=True)
class ScoringRule:
    """How a router turns logits into gating weights.

    score: "softmax" or "sigmoid", taken over all experts.
    renormalizes: whether the selected scores are divided by their sum. Softmax over the selected experts
        only is the same thing as softmax over all, renormalised.
    scale: what the weights are multiplied by at the end.
    """

    score: str
    renormalizes: bool
    scale: float = 1.0

    def weights(self, logits: Tensor, indices: Tensor) -> Tensor:
        """Gating weights of the experts `indices` [..., k] under `logits` [..., expert], float32 [..., k]."""
        chosen = SCORES[self.score](logits).gather(-1, indices)
        if self.renormalizes:
            chosen = chosen / chosen.sum(-1, keepdim=True)
        return chosen * self.scale


def recognize_rule(logits: Tensor, indices: Tensor, weights: Tensor) -> ScoringRule | None:
    """The rule that reproduces a router's `weights` [token, k] from `logits` [token, expert], or None.

    The scale is fitted by least squares; a rule is found when every weight agrees to 1e-4 of the largest.
    """
    target = weights.float()
    for score in SCORES:
        for renormalizes in (False, True):
            unscaled = ScoringRule(score, renormalizes).weights(logits, indices)
            scale = ((target * unscaled).sum() / unscaled.square().sum()).item()
            if (target - scale * unscaled).abs().max() <= 1e-4 * target.abs().max():
                return ScoringRule(score, renormalizes, round(scale, 4))
    return None


@dataclass(frozen=True)
class ObservedRouter:
    """What one call of a router shows.

    output_slots: where logits [token, expert], weights [token, k] and indices [token, k] are in its output.
    """

    n_experts: int
    top_k: int
    d_model: int
    scoring: ScoringRule
    output_slots: tuple[int, int, int]


def observe_router(router: nn.Module, path: str) -> ObservedRouter:
    """Call the router's own code with random weights on random tokens, on the CPU, and see what it does.

    Works for a router on any device, also the meta device. `path` names the router in the MoELensError for
    one that returns something else or scores by a rule that is not known.
    """
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5
        for name, tensor in [*router.named_parameters(), *router.named_buffers()]
        if tensor.is_floating_point() and tensor.ndim
    }
    matrices = [tensor for tensor in state.values() if tensor.ndim == 2]
    if not matrices:
        raise MoELensError(f"the router at {path!r} has no weight [expert, d_model]; it has {list(state)}")
    n_experts, d_model = matrices[0].shape
    hidden = torch.randn(PROBE_TOKENS, d_model, generator=generator)
    try:
        with torch.no_grad():
            output = torch.func.functional_call(router, state, (hidden,))
    except (TypeError, IndexError, RuntimeError) as error:  # raised by the model's code, for want of other inputs
        raise MoELensError(
            f"the router at {path!r} cannot be called with hidden states [token, d_model] alone: {error}"
        ) from error
    slots = _output_slots(output, n_experts)
    if slots is None:
        raise MoELensError(
            f"the router at {path!r} returns {_shapes(output)}; expected logits [token, expert], "
            "gating weights [token, k] and selected experts [token, k]"
        )
    logits, weights, indices = (output[slot] for slot in slots)
    scoring = recognize_rule(logits, indices, weights)
    if scoring is None:
        raise MoELensError(
            f"the router at {path!r} turns logits into gating weights by a rule that is not known; "
            "known are softmax and sigmoid, renormalised or not, times a constant"
        )
    return ObservedRouter(n_experts, indices.shape[-1], d_model, scoring, slots)


def _output_slots(output: Any, n_experts: int) -> tuple[int, int, int] | None:
    """Where logits, weights and indices are in a router's output, None unless each is there."""
    if not isinstance(output, tuple) or not all(isinstance(part, Tensor) for part in output):
        return None
    chosen = [i for i, part in enumerate(output) if not part.is_floating_point() and part.ndim == 2]
    if len(chosen) != 1:
        return None
    k = output[chosen[0]].shape[-1]
    floats = [i for i, part in enumerate(output) if part.is_floating_point()]
    logits = [i for i in floats if output[i].shape == (PROBE_TOKENS, n_experts)]
    weights = [i for i in floats if output[i].shape == (PROBE_TOKENS, k) and i not in logits[:1]]
    return (logits[0], weights[0], chosen[0]) if logits and weights else None


def _shapes(output: Any) -> str:
    parts = output if isinstance(output, tuple) else (output,)
    return ", ".join(str(list(part.shape)) if isinstance(part, Tensor) else type(part).__name__ for part in parts)
