"""CAD and AdaCAD: what the context makes more likely counts for more, and what memory says without it for less."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lens.data import Example
from moe_lens.decoding.plain import Decoding
from moe_lens.errors import MoELensError
from moe_lens.lens.twins import LogitContrast

MOST = 1e6
"""The largest alpha, far above any of use: logits times it are finite in float32."""


class Contrasted(Decoding):
    """A decoding by what the context makes of the logits; without a context it is plain."""

    def untouched(self, examples: Sequence[Example]) -> dict[str, int]:
        return {"without a context": sum(not example.context.strip() for example in examples)}


@dataclass(frozen=True)
class CAD(Contrasted):
    """Context-aware decoding (Shi et al. 2024), greedily: by (1 + alpha) · logits(y | c, q) - alpha · logits(y | q).

    The pass without the context runs beside the other, in one batch and under the same interventions; where these act
    at the context's tokens, it has none. An example without a context is answered as ever.

    alpha: 0, where it is plain decoding, to `MOST`; the paper's 1 for questions, 0.5 for summaries.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        _check(self.alpha, "alpha of CAD")

    @property
    def contrast(self) -> LogitContrast | None:
        return self._contrasted if self.alpha else None

    def _contrasted(self, given: Tensor, alone: Tensor) -> Tensor:
        return (1 + self.alpha) * given - self.alpha * alone

    def __str__(self) -> str:
        return f"cad:{self.alpha:.15g}"


@dataclass(frozen=True)
class AdaCAD(Contrasted):
    """CAD whose alpha is, at each token, the Jensen-Shannon divergence (nats) of the two next-token distributions.

    So it contrasts where context and memory disagree. At most ln 2 = 0.69.

    plus: added to it, 0 to `MOST`. The paper's 0.3 for summaries, 0 for questions.
    """

    plus: float = 0.0

    def __post_init__(self) -> None:
        _check(self.plus, "what is added to AdaCAD's alpha")

    @property
    def contrast(self) -> LogitContrast:
        return self._contrasted

    def _contrasted(self, given: Tensor, alone: Tensor) -> Tensor:
        alpha = jensen_shannon(given, alone)[..., None] + self.plus
        return (1 + alpha) * given - alpha * alone

    def __str__(self) -> str:
        return f"adacad:{self.plus:.15g}" if self.plus else "adacad"


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """The Jensen-Shannon divergence (nats) of two distributions given by their logits [..., vocab]; [...]."""
    logs = first.log_softmax(-1), second.log_softmax(-1)
    middle = torch.logaddexp(*logs) - math.log(2)
    return sum((log.exp() * (log - middle)).sum(-1) for log in logs) / 2  # type: ignore[return-value]  # two tensors


def _check(number: float, what: str) -> None:
    if not isinstance(number, int | float) or not 0 <= number <= MOST:
        raise MoELensError(f"{what} must be a number of 0 to {MOST:g}; got {number!r}")
