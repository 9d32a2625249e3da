"""Routing: what a router decided, and the rules that turn logits into gating weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lens.errors import MoELensError

IN_TURN = "in turn"
SHARED_IN_SUM = "a share of the shared experts"
SCALE_PER_EXPERT = "a learned scale of each expert"

SCORE_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.float().softmax(-1),
    "sigmoid": lambda logits: logits.float().sigmoid(),
    "sqrtsoftplus": lambda logits: F.softplus(logits.float()).sqrt(),
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

    has_logits: ClassVar[bool] = True
    """Whether `logits` are known."""

    def __repr__(self) -> str:
        *batch, k = self.indices.shape
        return f"Routing({' x '.join(map(str, batch))} tokens, {k} of {self.n_experts} experts each)"

    @property
    def n_experts(self) -> int:
        """Routed experts of the layer."""
        return self.logits.shape[-1]

    @property
    def has_weights(self) -> bool:
        """Whether `weights` are known."""
        return True

    def where(self, mask: Tensor, other: "Routing") -> "Routing":
        """`other` where `mask`, bool [batch, pos], is True; a smaller selection is filled up with weights of 0."""
        k = max(self.indices.shape[-1], other.indices.shape[-1])
        own, theirs = self._widened(k), other._widened(k)
        chosen = mask[..., None]
        return Routing(
            torch.where(chosen, theirs.logits, own.logits),
            torch.where(chosen, theirs.indices, own.indices),
            torch.where(chosen, theirs.weights, own.weights),
        )

    def _widened(self, k: int) -> "Routing":
        """With k experts per token: the first again, with weight 0, in the place of those that are missing."""
        missing = k - self.indices.shape[-1]
        if not missing:
            return self
        again = self.indices[..., :1].expand(*self.indices.shape[:-1], missing)
        return replace(
            self,
            indices=torch.cat([self.indices, again], -1),
            weights=F.pad(self.weights, (0, missing)),
        )

    def selected(self) -> Tensor:
        """Which experts were selected, bool [batch, pos, expert]."""
        none = torch.zeros(*self.indices.shape[:-1], self.n_experts, dtype=torch.bool, device=self.indices.device)
        return none.scatter(-1, self.indices, True)

    def probabilities(self) -> Tensor:
        """Softmax of the logits over all experts, float32 [batch, pos, expert]."""
        return SCORE_FUNCTIONS["softmax"](self.logits)

    def ranked(self) -> tuple[Tensor, Tensor]:
        """The selected experts and their weights from the highest weight down, each [batch, pos, k]."""
        weights, order = self.weights.sort(dim=-1, descending=True, stable=True)
        return self.indices.gather(-1, order), weights


class TracedRouting(Routing):
    """Routing as a serving engine tells it: the selected experts, mostly no weights, and never logits.

    Whatever needs what is not there raises MoELensError.
    weights: as in `Routing`; None where they are not known, and then `ranked` keeps the order of `indices`.
    """

    has_logits: ClassVar[bool] = False

    def __init__(self, indices: Tensor, n_experts: int, weights: Tensor | None = None) -> None:
        held = {"indices": indices, "_n_experts": n_experts} | ({} if weights is None else {"weights": weights})
        for name, value in held.items():
            object.__setattr__(self, name, value)

    @property
    def n_experts(self) -> int:
        return int(vars(self)["_n_experts"])

    @property
    def has_weights(self) -> bool:
        return "weights" in vars(self)

    def __getattr__(self, name: str) -> Tensor:
        if name not in ("logits", "weights"):
            raise AttributeError(name)
        what = "router logits" if name == "logits" else "gating weights"
        raise MoELensError(
            f"a trace of a serving engine says which experts were selected and holds no {what}; measure what counts "
            "selections, or run the model"
        )

    def ranked(self) -> tuple[Tensor, Tensor]:
        if self.has_weights:
            return super().ranked()
        return self.indices, torch.full(self.indices.shape, torch.nan, device=self.indices.device)


@dataclass(frozen=True)
class ScoringRule:
    """How a router turns logits into gating weights.

    score: one of `SCORE_FUNCTIONS`, taken over all experts; "in turn" for one expert after another, each by the softmax
        over the experts not yet chosen whose logits are within `margin` of the best.
    renormalizes: whether the selected scores are divided by their sum. Softmax over the selected experts
        only is the same thing as softmax over all, renormalised.
    scale: what the weights are multiplied by at the end.
    also: what else enters the weights, so that logits alone do not give them; empty if nothing does.
    """

    score: str
    renormalizes: bool
    scale: float = 1.0
    also: str = ""
    margin: float = 0.0

    def __str__(self) -> str:
        parts = [f"softmax, one expert after another within {self.margin:g}" if self.score == IN_TURN else self.score]
        parts += ["renormalised"] * self.renormalizes + [f"x {self.scale:g}"] * (self.scale != 1)
        return ", ".join(parts + [f"with {self.also}"] * bool(self.also))

    def weights(self, logits: Tensor, indices: Tensor) -> Tensor:
        """Gating weights of the experts `indices` [..., k] under `logits` [..., expert], float32 [..., k].

        Raises MoELensError where they depend on more than the logits (`also`).
        """
        if self.also:
            raise MoELensError(
                f"gating weights do not follow from the logits alone here, {self.also} enters them too; take the "
                "recorded ones"
            )
        chosen = _in_turn(logits, indices, self.margin) if self.score == IN_TURN else self.scores(logits, indices)
        if self.renormalizes:
            chosen = chosen / chosen.sum(-1, keepdim=True)
        return chosen * self.scale

    def fitted(self, logits: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The gating weights [..., k] that the rule allows next to `weights` [..., k], float32.

        Those of `weights()`. What the logits do not give (`also`) is taken from `weights`: one factor per token, or one
        per expert, the mean over its tokens.
        """
        if not self.also:
            return self.weights(logits, indices)
        bare = replace(self, also="").weights(logits, indices)
        if self.also == SHARED_IN_SUM:
            return bare * (weights.float().sum(-1, keepdim=True) / bare.sum(-1, keepdim=True))
        factors = (weights.float() / bare).flatten()
        count = torch.zeros(logits.shape[-1], device=logits.device)
        total = torch.zeros_like(count)
        count.index_add_(0, indices.flatten(), torch.ones_like(factors))
        total.index_add_(0, indices.flatten(), factors)
        return bare * (total / count.clamp(min=1))[indices]

    def scores(self, logits: Tensor, indices: Tensor) -> Tensor:
        """Scores of the experts `indices`, before renormalising and scaling, float32 [..., k]."""
        return SCORE_FUNCTIONS[self.score](logits).gather(-1, indices)


def contribution(indices: Tensor, weights: Tensor, outputs: Tensor, experts: Sequence[int] | None) -> Tensor:
    """The sum of gating weight times output over the selected experts of a set, or all, float32 [batch, pos, d_model].

    indices, weights: [batch, pos, k]. outputs: of each selected expert, [batch, pos, k, d_model].
    """
    if experts is not None:
        weights = weights * torch.isin(indices, torch.tensor(experts, device=indices.device))
    return torch.einsum("bpk,bpkd->bpd", weights.float(), outputs.float())


def recognize_rule(
    logits: Tensor, indices: Tensor, weights: Tensor, *, margin: float = 0.0, scores_shared: bool = False
) -> ScoringRule | None:
    """The rule that reproduces a router's `weights` [token, k] from `logits` [token, expert], or None.

    The scale is fitted by least squares; a rule is found when every weight agrees to 1e-4 of the largest. Rules in
    which a factor per token or per expert is not known are tried last. margin: of scoring in turn, where a router
    has one. scores_shared: whether the router makes logits of shared experts, too, which are not among `logits`; only
    then a factor per token is taken for their share, since of softmax scores, all weights proportional to exp(logit)
    would be one.
    """
    target = weights.float()
    rules = [ScoringRule(score, renormalizes) for score in SCORE_FUNCTIONS for renormalizes in (False, True)]
    for rule in [*rules, *([ScoringRule(IN_TURN, False, margin=margin)] if margin else [])]:
        unscaled = rule.weights(logits, indices)
        scale = ((target * unscaled).sum() / unscaled.square().sum()).item()
        if _agree(scale * unscaled, target):
            return replace(rule, scale=round(scale, 4))
    for rule in rules:
        found = [SHARED_IN_SUM] * (scores_shared and rule.renormalizes) + [SCALE_PER_EXPERT]
        for open_rule in (replace(rule, also=also) for also in found):
            if _agree(open_rule.fitted(logits, indices, target), target):
                return open_rule
    return None


def _agree(made: Tensor, target: Tensor) -> bool:
    return bool((target - made).abs().max() <= 1e-4 * target.abs().max())


def _in_turn(logits: Tensor, indices: Tensor, margin: float) -> Tensor:
    """Weights [..., k] of experts chosen one after another, see `ScoringRule`; float32."""
    left, weights = logits.float(), []
    for slot in range(indices.shape[-1]):
        best = left.max(-1, keepdim=True).values
        near = (best - logits) / logits.abs().clamp(min=best) <= margin
        chosen = indices[..., slot, None]
        weights.append(left.masked_fill(~near, -torch.inf).softmax(-1).gather(-1, chosen))
        left = left.scatter(-1, chosen, -torch.inf)
    return torch.cat(weights, -1)
