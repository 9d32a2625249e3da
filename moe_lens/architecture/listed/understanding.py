"""Finding out how a block of listed experts routes: the one known way that reproduces its output."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.architecture.listed.proof import relative_error, tolerance_of
from moe_lens.architecture.listed.readable import BlockRouting, ChoosingRouter, Parts, ScoringRouter, choices_in
from moe_lens.errors import MODEL_CRASHES, MoELensError
from moe_lens.routing import SCORE_FUNCTIONS, ScoringRule

MOST_SELECTED = 32


def understand(
    block: nn.Module, parts: Parts, path: str, tokens: Tensor, before: tuple[Any, ...], scales: Sequence[float]
) -> BlockRouting:
    """Which way of routing reproduces the block's output `before` [1, token, d_model] on `tokens`."""
    hidden, output = tokens[0], before[0][0].float()
    shared = getattr(block, parts.shared)(hidden).float() if parts.shared else torch.zeros_like(output)
    each = torch.stack([expert(hidden).float() for expert in getattr(block, parts.experts)])  # [expert, token, d_model]
    try:
        decided = getattr(block, parts.router)(tokens)
    except MODEL_CRASHES as error:
        raise MoELensError(
            f"the router {parts.router!r} of {path!r} cannot be called with [batch, pos, d_model]: {error}"
        ) from error

    def scale_for(indices: Tensor, weights: Tensor) -> float | None:
        """What the experts' outputs under `indices` and `weights` [token, k] must be multiplied by, None if no use."""
        gates = output.new_zeros(len(hidden), len(each)).scatter(-1, indices, weights.float())
        mixed = torch.einsum("te,etd->td", gates, each)
        return next((s for s in scales if relative_error(shared + s * mixed, output) <= tolerance_of(block)), None)

    found = (
        _scoring(decided[0], scale_for) if isinstance(decided, Tensor) else _choosing(decided, path, parts, scale_for)
    )
    if len(found) != 1:
        raise MoELensError(
            f"{len(found) or 'no'} known ways of routing reproduce the output of {path!r}; expected exactly one of "
            "softmax or sigmoid, top-k, renormalised or not, times a scale that the config states, plus shared experts"
        )
    return BlockRouting(parts, len(before) == 2, *found[0])


ScaleFor = Callable[[Tensor, Tensor], float | None]


def _scoring(logits: Tensor, scale_for: ScaleFor) -> list[tuple[type, dict[str, Any]]]:
    """All rules that turn `logits` [token, expert] into the choice that the block makes."""
    found: list[tuple[type, dict[str, Any]]] = []
    for score in SCORE_FUNCTIONS:
        for renormalizes in (False, True):
            rule = ScoringRule(score, renormalizes)
            for k in range(1, min(logits.shape[-1], MOST_SELECTED) + 1):
                indices = SCORE_FUNCTIONS[score](logits).topk(k, dim=-1).indices
                scale = scale_for(indices, rule.weights(logits, indices))
                if scale is not None:
                    found.append((ScoringRouter, {"rule": replace(rule, scale=scale), "top_k": k}))
    one_weight = [facts for _, facts in found if facts["top_k"] == 1 and facts["rule"].renormalizes]
    return found[:1] if len(one_weight) == len(found) else found  # one weight over itself is 1 by either score


def _choosing(decided: Any, path: str, parts: Parts, scale_for: ScaleFor) -> list[tuple[type, dict[str, Any]]]:
    """The router's own choice, if the block uses it."""
    choices = choices_in(decided)
    if not choices:
        raise MoELensError(
            f"the router {parts.router!r} of {path!r} returns {type(decided).__name__}; expected logits, or the "
            "selected experts and their gating weights [token, k]"
        )
    scale = scale_for(*choices[0])
    return [] if scale is None else [(ChoosingRouter, {"scale": scale})]
