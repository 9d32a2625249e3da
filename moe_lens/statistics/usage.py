"""ExpertUsage: how much each expert is used, such as the paper's context-dependence ratio (Eq. 8)."""

from typing import Any, Literal, Self, get_args

import pandas as pd
import torch

from moe_lens.errors import MoELensError
from moe_lens.lens.devices import OnDevices, on_cpu
from moe_lens.lens.needs import Needs
from moe_lens.lens.positions import Positions
from moe_lens.lens.record import Record
from moe_lens.routing import Routing
from moe_lens.statistics.accumulators import check_alike

Reduction = Literal["sample", "token"]
Value = Literal["frequency", "gating_weight", "gate"]
SETTINGS = ("reduce", "positions", "value")


class ExpertUsage:
    """The mean use r_i of every expert i in every MoE layer, accumulated over records.

    value, what a token t with selected experts S_t adds to expert i in S_t (0 to all others):
        "frequency": 1/k, with k = |S_t|. The sum over experts of r_i is 1 in each layer. On a router-tuned
            model this is the paper's context-dependence ratio, with `reduce="token"` ESFT's token score.
        "gating_weight": the weight by which the expert's output is multiplied, as it was used.
        "gate": the softmax over all experts' router logits, not renormalised (with `reduce="token"` ESFT's
            gate score).
    reduce: "sample" is the mean over samples of the mean over the sample's tokens (Eq. 8), "token" the mean
        over all tokens, in which long samples count for more (ESFT's published scores).
    positions: which tokens count, in the words of `Record.position_mask`; pads never do.

    Samples without any such position, for example without a context, are left out of the mean and counted in
    `skipped`; `counted` is the number of samples that are in it.

    >>> ratios = lens.measure(examples, ExpertUsage())[0].table()   # columns layer, expert, score
    >>> ExpertSet.top(ratios, 4)
    """

    def __init__(
        self, reduce: Reduction = "sample", positions: Positions = "all", *, value: Value = "frequency"
    ) -> None:
        self.reduce, self.positions, self.value = reduce, positions, value
        self.needs = Needs.of({"routing"}, positions)
        self.settings: dict[str, Any] = {name: getattr(self, name) for name in SETTINGS}
        for name, word, known in (("reduce", reduce, get_args(Reduction)), ("value", value, get_args(Value))):
            if word not in known:
                raise MoELensError(f"{name} must be one of {', '.join(known)}; got {word!r}")
        self.counted = 0
        self.skipped = 0
        self._total = 0.0
        self._sums: dict[int, torch.Tensor] = {}

    def update(self, record: Record) -> Self:
        """Adds a record's samples; MoELensError for a record without routing or of other layers."""
        record.expect(self.needs.captures)
        mask = record.position_mask(self.positions)
        tokens = mask.sum(dim=1)
        present = tokens > 0
        counted, lengths = OnDevices(mask), OnDevices(tokens)
        sums = [self._sum(routing, counted, lengths) for routing in record.routing.values()]
        self._add(
            dict(zip(record.routing, on_cpu(sums), strict=True)),
            total=float(present.sum() if self.reduce == "sample" else tokens.sum()),
            counted=int(present.sum()),
            skipped=int((~present).sum()),
        )
        return self

    def merge(self, other: Self) -> Self:
        """Adds what another usage of the same settings and model has seen; MoELensError for any other."""
        check_alike(self, other)
        if other._sums:
            self._add(other._sums, total=other._total, counted=other.counted, skipped=other.skipped)
        return self

    def table(self) -> pd.DataFrame:
        """One row per expert: layer, expert, score (r_i); `attrs` says how it was counted.

        Raises MoELensError if no sample had a position that counts.
        """
        if not self.counted:
            raise MoELensError(f"none of {self.skipped} samples has any position {self.positions!r} to count")
        rows = [
            (layer, expert, total / self._total)
            for layer in sorted(self._sums)
            for expert, total in enumerate(self._sums[layer].tolist())
        ]
        table = pd.DataFrame(rows, columns=["layer", "expert", "score"])
        table.attrs = self.settings | {"counted": self.counted, "skipped": self.skipped}
        return table

    def _sum(self, routing: Routing, mask: OnDevices, tokens: OnDevices) -> torch.Tensor:
        """The record's sum [expert], float64, over samples or tokens.

        mask: bool [batch, pos]. tokens: int64 [batch], the positions that count of each sample.
        """
        indices = routing.indices
        batch, _, k = indices.shape
        if self.value == "frequency":
            added = torch.full(indices.shape, 1 / k, dtype=torch.float64, device=indices.device)
        elif self.value == "gating_weight":
            added = routing.weights.double()
        else:
            added = routing.probabilities().gather(-1, indices).double()
        added = added.masked_fill(~mask.on(added.device)[..., None], 0.0)
        sums = torch.zeros(batch, routing.n_experts, dtype=torch.float64, device=added.device)
        sums.scatter_add_(1, indices.flatten(1), added.flatten(1))
        if self.reduce == "sample":
            sums /= tokens.on(sums.device).clamp(min=1)[:, None]
        return sums.sum(dim=0)

    def _add(self, sums: dict[int, torch.Tensor], *, total: float, counted: int, skipped: int) -> None:
        if not self._sums:
            self._sums = {layer: torch.zeros_like(row) for layer, row in sums.items()}
        shapes, others = ({layer: len(row) for layer, row in part.items()} for part in (self._sums, sums))
        if shapes != others:
            raise MoELensError(f"expected experts per layer as in the records so far, {shapes}; got {others}")
        for layer, row in sums.items():
            self._sums[layer] += row
        self._total += total
        self.counted += counted
        self.skipped += skipped
