"""ExpertPortraits: what each expert is asked for and what it writes, to find it again in another model."""

import pandas as pd
import torch
from torch import Tensor

from moe_lens.errors import MoELensError
from moe_lens.lens.lens import MoELens
from moe_lens.lens.positions import Positions
from moe_lens.lens.record import Record
from moe_lens.metrics.matched_experts import matches_table
from moe_lens.statistics.expert_outputs import OutputSums
from moe_lens.statistics.weights import router_rows


class ExpertPortraits(OutputSums):
    """Each expert's row of the router, and its mean output on the tokens that select it.

    lens: whose router is read; None where a saved statistic is read again, with its rows.
    """

    def __init__(self, lens: MoELens | None, positions: Positions = "all") -> None:
        super().__init__(positions)
        self._rows = {} if lens is None else router_rows(lens)

    def sums(self, record: Record) -> dict[int, dict[str, Tensor]]:
        found = {}
        for layer, n_experts, indices, _, outputs in self.outputs(record):
            flat = indices.flatten()
            written = torch.zeros(n_experts, outputs.shape[-1], dtype=torch.float64, device=outputs.device)
            written.index_add_(0, flat, outputs.flatten(0, 1))
            counted = torch.zeros(n_experts, dtype=torch.float64, device=outputs.device)
            counted.index_add_(0, flat, torch.ones_like(flat, dtype=torch.float64))
            rows = self._rows[layer] * len(indices)  # so that parts add up to it, times all tokens
            found[layer] = {"written": written, "tokens": counted, "rows": rows}
        return found

    def matched(self, other: "ExpertPortraits") -> pd.DataFrame:
        """`matches_table` of each layer by the cosine of router rows, and by that of mean outputs.

        Cosines of two models mean something where their residual streams do: where one was made of the other. An expert
        that is never selected has no output, and a similarity of 0. Raises MoELensError if no token counted, and for
        models of other layers or widths.
        """
        mine, its = self.layer_sums(), other.layer_sums()
        shapes = [{layer: own["written"].shape[1] for layer, own in sums.items()} for sums in (mine, its)]
        if shapes[0] != shapes[1]:
            raise MoELensError(f"expected two models of the same layers and widths; got {shapes[0]} and {shapes[1]}")
        parts = []
        for by, name in (("router rows", "rows"), ("outputs", "written")):
            for layer, own in mine.items():
                unit = [torch.nn.functional.normalize(sums[name], dim=-1) for sums in (own, its[layer])]
                parts.append(matches_table(layer, by, (unit[0] @ unit[1].T).numpy()))
        table = pd.concat(parts, ignore_index=True)
        table.attrs = dict(self.settings)
        return table

    def table(self) -> pd.DataFrame:
        """One row per expert: layer, expert, tokens (that selected it), output (the norm of its mean output).

        Raises MoELensError if no token counted.
        """
        parts = []
        for layer, sums in self.layer_sums().items():
            mean = sums["written"] / sums["tokens"].clamp(min=1)[:, None]
            columns = {"layer": layer, "expert": range(len(mean)), "tokens": sums["tokens"].long().numpy()}
            parts.append(pd.DataFrame(columns | {"output": mean.norm(dim=-1).numpy()}))
        table = pd.concat(parts, ignore_index=True)
        table.attrs = dict(self.settings)
        return table
