"""What single experts put out: their saliency, what they write into the vocabulary, and how alike they are."""

from collections.abc import Callable, Iterator, Mapping
from typing import Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from moe_lens.errors import MoELensError
from moe_lens.lens.devices import OnDevices
from moe_lens.lens.needs import Needs
from moe_lens.lens.positions import Positions
from moe_lens.lens.record import Record
from moe_lens.statistics.accumulators import GroupSums, LayerSums
from moe_lens.statistics.jackknife import GROUPS, Sums, groups_of
from moe_lens.statistics.pairs import pairs_table


class OutputSums(LayerSums):
    """Sums over the outputs of the selected experts.

    positions: which tokens count, as in `Record.position_mask`.
    """

    def __init__(self, positions: Positions = "all") -> None:
        self.positions = positions
        super().__init__(Needs.of({"routing", "expert_outputs"}, positions), {"positions": positions})

    def outputs(self, record: Record) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
        """Per layer: layer, n_experts, indices [token, k], weights [token, k], outputs [token, k, d_model]."""
        example, row = record.kept_mask(self.positions).nonzero(as_tuple=True)
        tokens = OnDevices(example * record.input_ids.shape[1] + record.kept[row])
        kept = OnDevices(example * len(record.kept) + row)
        for layer, outputs in record.expert_outputs.items():
            routing = record.routing[layer]
            indices, weights = (tokens.of(part.flatten(0, 1)) for part in (routing.indices, routing.weights))
            yield layer, routing.n_experts, indices, weights.double(), kept.of(outputs.flatten(0, 1)).double()

    def groups(self, record: Record) -> OnDevices:
        """The group of each of these tokens, int64 [token]."""
        return OnDevices(groups_of(record.ids)[record.kept_mask(self.positions).nonzero()[:, 0]])


class ExpertSaliency(OutputSums, GroupSums):
    """REAP and EAN: how much an expert adds to the layer's output (Lasby et al. 2025; Jaiswal et al. 2025).

    >>> ExpertSet.top(saliency.table(), 4, score="reap")
    """

    size = "tokens"
    bounds: Mapping[str, tuple[float, float]] = {"reap": (0, float("inf"))}

    def sums(self, record: Record) -> dict[int, dict[str, Tensor]]:
        found, groups = {}, self.groups(record)
        for layer, n_experts, indices, weights, outputs in self.outputs(record):
            norms = outputs.norm(dim=-1)
            values = torch.stack([torch.ones_like(norms), norms, weights * norms], -1).flatten(0, 1)  # [selection, 3]
            places = (groups.on(indices.device)[:, None] * n_experts + indices).flatten()
            sums = torch.zeros(GROUPS * n_experts, 3, dtype=torch.float64, device=values.device)
            parts = sums.index_add_(0, places, values).view(GROUPS, n_experts, 3).unbind(-1)
            found[layer] = dict(zip(("tokens", "norm", "weighted_norm"), parts, strict=True))
        return found

    def numbers(self, sums: Sums) -> dict[str, np.ndarray]:
        """reap, [expert]; NaN for an expert that was never selected."""
        norm, tokens = sums["weighted_norm"], sums["tokens"]
        return {"reap": np.divide(norm, tokens, out=np.full(norm.shape, np.nan), where=tokens > 0)}

    def table(self) -> pd.DataFrame:
        """One row per expert: layer, expert, tokens (that selected it), reap, its interval, ean.

        reap: the mean over these tokens of gating weight times norm of the expert's output, 0 for an expert that was
        never selected. reap_low and _high: its 95 % interval over texts (`with_interval`), NaN where some group of
        texts holds all that selected it. ean: the sum over these tokens of the norm.
        """
        parts, estimates = [], self.estimates()
        for layer, sums in self.layer_sums().items():
            tokens, norm = (sums[name].sum(0).numpy() for name in ("tokens", "norm"))
            columns = {"layer": layer, "expert": np.arange(len(tokens)), "tokens": tokens.astype(int)}
            parts.append(pd.DataFrame(columns | estimates[layer] | {"ean": norm}).fillna({"reap": 0.0}))
        return _table(parts, self)


class ExpertVocabulary(OutputSums):
    """The logit lens on single experts: which tokens of the vocabulary each expert writes towards.

    It reads the mean over tokens of gating weight times output, which is what the expert adds to the residual stream.
    project: [..., d_model] -> [..., vocab], linear: the head alone, as
        `lens.module.get_submodule(lens.architecture.head)`.

    Tokens that the data have are told apart from all others: rows of the head that training never had as a target move
    together, so that an expert which lowers them less than its layer does seems to write them.

    Raises MoELensError for experts whose sum goes through a map to another width first, so that no head reads it.
    """

    def __init__(self, project: Callable[[Tensor], Tensor], *, top: int = 10, positions: Positions = "all") -> None:
        if top < 1:
            raise MoELensError(f"top is how many tokens each expert is shown with, at least 1; got {top}")
        super().__init__(positions)
        self.project, self.top = project, top
        self._read: set[int] = set()

    def update(self, record: Record) -> Self:
        super().update(record)
        counted = record.position_mask(self.positions).any(1, keepdim=True).to(record.attention_mask.device)
        self._read.update(record.token_ids[record.attention_mask.bool() & counted].unique().tolist())
        return self

    def merge(self, other: Self) -> Self:
        super().merge(other)
        self._read |= other._read
        return self

    def state(self) -> pd.DataFrame:
        """The sums so far, and in a row with layer -1 which tokens were read; no rows where there are none."""
        if not self._read:
            return super().state()
        read = {"layer": -1, "name": "read", "shape": [len(self._read)], "values": np.array(sorted(self._read), float)}
        return pd.concat([super().state(), pd.DataFrame([read])], ignore_index=True)

    def add_state(self, state: pd.DataFrame) -> Self:
        """Adds what `state` gave; MoELensError for sums that were kept before they told which tokens were read."""
        read, sums = state[state["layer"] < 0], state[state["layer"] >= 0]
        if len(sums) and not len(read):
            raise MoELensError("what experts write was kept without the tokens that were read; measure it again")
        for values in read["values"]:
            self._read.update(np.asarray(values).astype(int).tolist())
        return super().add_state(sums)

    def sums(self, record: Record) -> dict[int, dict[str, Tensor]]:
        found = {}
        for layer, n_experts, indices, weights, outputs in self.outputs(record):
            _expect_width(self.project, outputs.shape[-1])
            written = torch.zeros(n_experts, outputs.shape[-1], dtype=torch.float64, device=outputs.device)
            written.index_add_(0, indices.flatten(), (weights[..., None] * outputs).flatten(0, 1))
            tokens = _per_expert(torch.ones_like(weights), indices, n_experts)
            found[layer] = {"tokens": tokens, "written": written}
        return found

    def table(self) -> pd.DataFrame:
        """For each expert that was selected the `top` tokens of those that were read, and of those that were not.

        Columns: layer, expert, tokens (that selected it), read (whether the token was, anywhere in a text in which a
        position counts), rank, token_id, logit, excess. logit: what one selection of the expert adds to the token's
        logit on average, before the final norm. excess: logit minus its mean over the layer's experts, by which the
        tokens are ranked: what experts write alike tells nothing about one of them.
        """
        parts = []
        for layer, sums in self.layer_sums().items():
            used = sums["tokens"].nonzero()[:, 0]
            mean = (sums["written"] / sums["tokens"].clamp(min=1)[:, None])[used]
            with torch.no_grad():
                logits = self.project(_taken(mean, self.project)).cpu().double()  # [expert, vocab]
            was_read = torch.zeros(logits.shape[1], dtype=torch.bool)
            was_read[sorted(self._read)] = True
            for read in (True, False):
                among = (was_read == read).nonzero()[:, 0]
                best, places = (logits - logits.mean(0))[:, among].topk(min(self.top, len(among)), dim=1)
                ids, shown = among[places], best.shape[1]
                columns = {"layer": layer, "expert": used.repeat_interleave(shown).numpy()}
                columns |= {"tokens": sums["tokens"][used].long().repeat_interleave(shown).numpy(), "read": read}
                columns |= {"rank": np.tile(np.arange(shown), len(used)), "token_id": ids.flatten().numpy()}
                columns |= {"logit": logits.gather(1, ids).flatten().numpy(), "excess": best.flatten().numpy()}
                parts.append(pd.DataFrame(columns))
        table = _table(parts, self).sort_values(
            ["layer", "expert", "read", "rank"], ascending=[True, True, False, True]
        )
        return table.reset_index(drop=True)


class OutputSimilarity(OutputSums, GroupSums):
    """How alike two experts' outputs are on the tokens that select both: the mean cosine."""

    size = "together"
    bounds: Mapping[str, tuple[float, float]] = {"similarity": (-1, 1)}

    def sums(self, record: Record) -> dict[int, dict[str, Tensor]]:
        found, groups = {}, self.groups(record)
        for layer, n_experts, indices, _, outputs in self.outputs(record):
            unit = torch.nn.functional.normalize(outputs, dim=-1)
            cosine = unit @ unit.transpose(-1, -2)  # [token, k, k]
            own = groups.on(indices.device)[:, None] * n_experts + indices
            pairs = (own[..., :, None] * n_experts + indices[..., None, :]).flatten()
            sums = torch.zeros(2, GROUPS * n_experts**2, dtype=torch.float64, device=outputs.device)
            sums[0].index_add_(0, pairs, cosine.flatten())
            sums[1].index_add_(0, pairs, torch.ones_like(cosine).flatten())
            cosines, together = sums.view(2, GROUPS, n_experts, n_experts)
            found[layer] = {"cosine": cosines, "together": together}
        return found

    def numbers(self, sums: Sums) -> dict[str, np.ndarray]:
        """similarity, [expert, other]."""
        cosine, together = sums["cosine"], sums["together"]
        similarity = np.divide(cosine, together, out=np.full(cosine.shape, np.nan), where=together > 0)
        return {"similarity": similarity}

    def table(self) -> pd.DataFrame:
        """One row per ordered pair of different experts: layer, expert, other, together, similarity, its interval.

        together: tokens that selected both. similarity: the mean cosine of the two outputs there, NaN without any;
        similarity_low and _high: its 95 % interval over texts (`with_interval`).
        """
        parts, sums = [], self.layer_sums()
        for layer, found in self.estimates().items():
            together = sums[layer]["together"].sum(0).numpy().astype(int)
            parts.append(pairs_table(layer, {"together": together} | found))
        return _table(parts, self)


def _per_expert(values: Tensor, indices: Tensor, n_experts: int) -> Tensor:
    """Sums of values [token, k] by the expert of each, float64 [expert]."""
    sums = torch.zeros(n_experts, dtype=torch.float64, device=values.device)
    return sums.index_add_(0, indices.flatten(), values.double().flatten())


def _expect_width(project: Callable[[Tensor], Tensor], width: int) -> None:
    """MoELensError for a head that takes vectors of another width than experts put out."""
    taken = project.in_features if isinstance(project, torch.nn.Linear) else width
    if taken != width:
        raise MoELensError(
            f"expected experts that write into the residual stream, whose width of {taken} the head takes; these give "
            f"vectors of {width}, and their block maps the sum to the stream, so no head reads a single expert; use "
            "ExpertSaliency or OutputSimilarity"
        )


def _taken(values: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
    """The values as a projection takes them: of its weights' dtype and device where it has any, else float32."""
    weight = next(project.parameters(), None) if isinstance(project, torch.nn.Module) else None
    if weight is None:
        return values.float()
    return values.to(weight.dtype if weight.is_meta else weight)  # weights on a disk are fetched to the values


def _table(parts: list[pd.DataFrame], statistic: OutputSums) -> pd.DataFrame:
    table = pd.concat(parts, ignore_index=True)
    table.attrs = dict(statistic.settings)
    return table
