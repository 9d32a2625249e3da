"""ExpertUsage: how much each expert is used, such as the paper's context-dependence ratio (Eq. 8)."""

from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from moe_lens.errors import MoELensError
from moe_lens.lens.devices import OnDevices
from moe_lens.lens.needs import Needs
from moe_lens.lens.positions import Positions
from moe_lens.lens.record import Record
from moe_lens.routing import Routing
from moe_lens.statistics.accumulators import GroupSums
from moe_lens.statistics.jackknife import Sums, by_group, groups_of

Reduction = Literal["sample", "token"]
Value = Literal["frequency", "gating_weight", "gate"]
SETTINGS = ("reduce", "positions", "value")


class ExpertUsage(GroupSums):
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

    size = "total"
    bounds: Mapping[str, tuple[float, float]] = {"score": (0, 1)}

    def __init__(
        self, reduce: Reduction = "sample", positions: Positions = "all", *, value: Value = "frequency"
    ) -> None:
        self.reduce, self.positions, self.value = reduce, positions, value
        for name, word, known in (("reduce", reduce, get_args(Reduction)), ("value", value, get_args(Value))):
            if word not in known:
                raise MoELensError(f"{name} must be one of {', '.join(known)}; got {word!r}")
        super().__init__(Needs.of({"routing"}, positions), {name: getattr(self, name) for name in SETTINGS})

    @property
    def counted(self) -> int:
        """Samples that are in the mean."""
        return self._samples(0)

    @property
    def skipped(self) -> int:
        """Samples without any position that counts."""
        return self._samples(1)

    def sums(self, record: Record) -> dict[int, dict[str, Tensor]]:
        mask = record.position_mask(self.positions)
        tokens, of_groups = mask.sum(dim=1), groups_of(record.ids)
        counted, lengths, groups = OnDevices(mask), OnDevices(tokens), OnDevices(of_groups)
        present = (tokens > 0).double()
        told = torch.stack([present if self.reduce == "sample" else tokens, present, 1 - present], dim=1)
        total, *samples = by_group(told, groups).unbind(1)  # [group] each
        told_of_all = {"total": total, "samples": torch.stack(samples, dim=1)}
        return {
            layer: {"use": self._sum(routing, counted, lengths, groups)} | told_of_all
            for layer, routing in record.routing.items()
        }

    def numbers(self, sums: Sums) -> dict[str, np.ndarray]:
        """score, [expert]."""
        return {"score": sums["use"] / sums["total"]}

    def table(self) -> pd.DataFrame:
        """One row per expert: layer, expert, score (r_i); `attrs` says how it was counted.

        Raises MoELensError if no sample had a position that counts.
        """
        if not self.counted:
            raise MoELensError(f"none of {self.skipped} samples has any position {self.positions!r} to count")
        parts = []
        for layer, sums in self.layer_sums().items():
            score = (sums["use"].sum(0) / sums["total"].sum()).numpy()
            parts.append(pd.DataFrame({"layer": layer, "expert": np.arange(len(score)), "score": score}))
        table = pd.concat(parts, ignore_index=True)
        table.attrs = self.settings | {"counted": self.counted, "skipped": self.skipped}
        return table

    def _samples(self, place: int) -> int:
        return next((int(own["samples"][:, place].sum()) for own in self._sums.values()), 0)

    def _sum(self, routing: Routing, mask: OnDevices, tokens: OnDevices, groups: OnDevices) -> Tensor:
        """The record's sums [group, expert], float64, over samples or tokens.

        mask: bool [batch, pos]. tokens: int64 [batch], the positions that count of each sample. groups: int64 [batch].
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
        return by_group(sums, groups)
