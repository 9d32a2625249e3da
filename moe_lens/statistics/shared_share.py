"""SharedShare: how shared and routed experts divide the work of a layer."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from moe_lens.errors import MoELensError
from moe_lens.lens.devices import OnDevices, places_of
from moe_lens.lens.needs import Needs
from moe_lens.lens.positions import Positions
from moe_lens.lens.record import Record
from moe_lens.statistics.accumulators import GroupSums
from moe_lens.statistics.expert_outputs import OutputSums
from moe_lens.statistics.jackknife import Sums, by_group

NUMBERS = ("shared", "routed", "share", "cosine")


class SharedShare(OutputSums, GroupSums):
    """How much of what a layer's experts add comes from its shared experts, token by token.

    With s what the shared experts add at a token and r the sum of the routed experts' outputs times their gating
    weights, the share is |s| / (|s| + |r|); the cosine of both is below 0 where they undo one another.
    """

    size = "tokens"
    bounds: Mapping[str, tuple[float, float]] = {"share": (0, 1), "cosine": (-1, 1)}

    def __init__(self, positions: Positions = "all") -> None:
        super().__init__(positions)
        self.needs |= Needs.of({"shared_output"}, positions)

    def sums(self, record: Record) -> dict[int, dict[str, Tensor]]:
        kept = OnDevices(places_of(record.kept_mask(self.positions)))
        found, groups = {}, self.groups(record)
        for layer, _, _, weights, outputs in self.outputs(record):
            if layer not in record.shared_output:
                continue
            shared = kept.of(record.shared_output[layer].flatten(0, 1)).double()  # [token, d_model]
            if shared.shape[-1] != outputs.shape[-1]:
                raise MoELensError(
                    f"layer {layer} maps the sum of its routed experts from {outputs.shape[-1]} to {shared.shape[-1]} "
                    "numbers before what the shared ones give joins it, so that the two cannot be compared"
                )
            routed = (weights[..., None] * outputs).sum(1)
            norms = torch.stack([shared, routed], 1).norm(dim=-1)  # [token, 2]
            share = norms[:, 0] / norms.sum(1).clamp(min=1e-30)
            cosine = (shared * routed).sum(1) / norms.prod(1).clamp(min=1e-30)
            values = torch.stack([torch.ones_like(share), *norms.unbind(1), share, cosine], 1)
            found[layer] = dict(zip(("tokens", *NUMBERS), by_group(values, groups).unbind(1), strict=True))
        return found

    def numbers(self, sums: Sums) -> dict[str, np.ndarray]:
        """NUMBERS, each of the layer."""
        return {name: np.asarray(sums[name] / sums["tokens"]) for name in NUMBERS}

    def table(self) -> pd.DataFrame:
        """One row per layer with shared experts: layer, tokens, and means over tokens with their intervals over texts.

        shared, routed: the norms |s| and |r|. share: |s| / (|s| + |r|). cosine: of s and r. Raises MoELensError if no
        token counted.
        """
        return self.layer_table()
