"""What checks share: how far apart two things are, how far they may be, and which experts they change."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lens.architecture.discovery import pretrained
from moe_lens.experts import ExpertSet
from moe_lens.lens.lens import MoELens
from moe_lens.lens.record import Record

CLOSE = {torch.float32: 1e-4, torch.float64: 1e-6}
CLOSE_IN_LOW_PRECISION = 5e-2


@dataclass(frozen=True)
class Finding:
    """What a check found. error: the largest difference by the largest value; it may be up to `allowed`."""

    error: float
    allowed: float
    detail: str = ""


def compared(changed: Tensor, expected: Tensor, plain: Tensor, allowed: float, experts: ExpertSet) -> Finding:
    """How far apart they are; as far as can be if the change shows nowhere, so that the comparison says nothing."""
    effect = apart(changed, plain)
    if effect == 0:
        return Finding(float("inf"), allowed, f"masking '{experts}' changes nothing")
    low = allowed == CLOSE_IN_LOW_PRECISION  # where scores tie, and the place decides
    largest = apart(changed, expected)
    if not low:
        return Finding(largest, allowed, f"effect {effect:.2g}")
    detail = f"effect {effect:.2g}; without the tenth of the positions that are farthest apart, by up to {largest:.2g}"
    return Finding(_mostly_apart(changed, expected), allowed, detail)


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference by the largest finite value of b; infinite where one is not a number or has no equal."""
    a, b = a.float(), b.float().to(a.device)
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    finite = b.isfinite()
    if not finite.any():
        return 0.0
    return ((a[finite] - b[finite]).abs().max() / b[finite].abs().max().clamp(min=1e-30)).item()


def _mostly_apart(a: Tensor, b: Tensor) -> float:
    """As `_apart` of [batch, pos, ...], without the tenth of the positions that are farthest apart."""
    by_position = (a.float() - b.float()).abs().amax(-1).flatten()
    return (by_position.quantile(0.9) / b.float().abs().max().clamp(min=1e-30)).item()


def close(lens: MoELens) -> float:
    """How far apart numbers may be that need not have the same bits."""
    return CLOSE.get(pretrained(lens.module).dtype, CLOSE_IN_LOW_PRECISION)


def used(lens: MoELens, texts: Sequence[str]) -> ExpertSet:
    """The most used expert of each layer, among those that have weights."""
    return used_in(lens, lens.run_with_cache(texts)[1])


def used_in(lens: MoELens, record: Record) -> ExpertSet:
    """The most used expert of each layer in a record, among those that have weights."""
    found = {}
    for layer, routing in record.routing.items():
        with_weights = len(lens.architecture.at(layer).output_weights(lens.module))
        chosen = routing.indices[record.attention_mask.bool().to(routing.indices.device)].flatten()
        found[layer] = [int(torch.bincount(chosen, minlength=with_weights)[:with_weights].argmax())]
    return ExpertSet.of(found)


def removable(lens: MoELens, experts: ExpertSet) -> ExpertSet:
    """These and one of every other group, so that groups stay equally large."""
    if lens.architecture.groups is None:
        return experts
    size = lens.architecture.n_experts // lens.architecture.groups[0]
    starts = range(0, lens.architecture.n_experts, size)
    return ExpertSet.of({layer: [start + experts[layer][0] % size for start in starts] for layer in experts.layers})
