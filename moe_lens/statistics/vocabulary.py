"""VocabularySpecialisation: which experts a token of the vocabulary goes to, wherever it stands."""

from typing import Any, Literal, Self, cast, get_args

import numpy as np
import pandas as pd
from torch import Tensor

from moe_lens.errors import MoELensError
from moe_lens.lens.devices import OnDevices, on_cpu, places_of
from moe_lens.lens.needs import Needs
from moe_lens.lens.positions import Positions
from moe_lens.lens.record import Record
from moe_lens.statistics.accumulators import check_alike

Source = Literal["input", "predicted"]


class VocabularySpecialisation:
    """The share of a vocabulary token's occurrences that select an expert, N_xi / N_x (Muennighoff et al. 2024).

    source, what x is: "input", the token that is read at a position, or "predicted", the one the model finds most
        likely there.
    positions: which positions count, as in `Record.position_mask`.

    Only pairs that occur are kept, so memory is bounded by vocabulary times experts, not by the data.
    """

    def __init__(self, source: Source = "input", *, positions: Positions = "all") -> None:
        if source not in get_args(Source):
            raise MoELensError(f"source must be one of {', '.join(get_args(Source))}; got {source!r}")
        self.source, self.positions = source, positions
        self.needs = Needs.of({"routing"} if source == "input" else {"routing", "logits"}, positions)
        self.settings: dict[str, Any] = {"source": source, "positions": positions}
        self._selected: dict[int, pd.Series] = {}
        self._tokens = pd.Series(dtype=np.int64)

    def update(self, record: Record) -> Self:
        """Adds a record's tokens; MoELensError for a record without what is needed."""
        record.expect(self.needs.captures)
        mask = record.position_mask(self.positions)
        read = record.token_ids if self.source == "input" else self._predicted(record)
        words, tokens = read[mask].numpy(), OnDevices(places_of(mask))  # [token]
        selected = on_cpu(tokens.of(routing.indices.flatten(0, 1)) for routing in record.routing.values())
        self._tokens = _added(self._tokens, pd.Series(words).value_counts())
        for layer, experts in zip(record.routing, selected, strict=True):  # [token, k]
            pairs = pd.MultiIndex.from_arrays([np.repeat(words, experts.shape[1]), experts.flatten().numpy()])
            counts = pd.Series(1, index=pairs).groupby(level=[0, 1]).sum()
            self._selected[layer] = _added(self._selected.get(layer, counts.iloc[:0]), counts)
        return self

    def _predicted(self, record: Record) -> Tensor:
        """The token found most likely at each position that counts, int64 [batch, pos]."""
        predicted = record.input_ids.new_zeros(record.input_ids.shape)
        record.kept_mask(self.positions)  # raises where a position was not kept
        predicted[:, record.kept] = cast(Tensor, record.logits).argmax(-1).cpu()
        return predicted

    def merge(self, other: Self) -> Self:
        """Adds what another statistic of the same settings has seen; MoELensError for any other."""
        check_alike(self, other)
        self._tokens = _added(self._tokens, other._tokens)
        for layer, counts in other._selected.items():
            self._selected[layer] = _added(self._selected.get(layer, counts.iloc[:0]), counts)
        return self

    def state(self) -> pd.DataFrame:
        """The counts so far: layer, expert, token_id, count; in rows with layer -1 how often a token was read."""
        parts = [pd.DataFrame({"layer": -1, "expert": -1, "token_id": self._tokens.index, "count": self._tokens.array})]
        for layer, counts in self._selected.items():
            words, experts = (counts.index.get_level_values(level) for level in (0, 1))
            parts.append(pd.DataFrame({"layer": layer, "expert": experts, "token_id": words, "count": counts.array}))
        return pd.concat(parts, ignore_index=True).astype("int64")

    def add_state(self, state: pd.DataFrame) -> Self:
        """Adds what `state` of another statistic of the same settings gave."""
        for layer, part in state.groupby("layer"):
            if layer < 0:
                self._tokens = _added(self._tokens, part.set_index("token_id")["count"])
            else:
                counts = part.set_index(["token_id", "expert"])["count"].rename_axis(index=[None, None])
                self._selected[layer] = _added(self._selected.get(layer, counts.iloc[:0]), counts)
        return self

    def table(self) -> pd.DataFrame:
        """One row per layer, token and expert that occur together.

        Columns: layer, expert, token_id, tokens (occurrences of the token, N_x), selected (those that selected the
        expert, N_xi), specialisation. Over the experts of a token it sums to k. Mind rare tokens: their shares are few
        and extreme. Raises MoELensError if no token counted.
        """
        if self._tokens.empty:
            raise MoELensError(f"VocabularySpecialisation has seen no token that counts ({self.settings})")
        parts = []
        for layer, counts in sorted(self._selected.items()):
            words, experts = (counts.index.get_level_values(level).to_numpy() for level in (0, 1))
            tokens = self._tokens.loc[words].to_numpy()
            columns = {"layer": layer, "expert": experts, "token_id": words, "tokens": tokens}
            columns |= {"selected": counts.to_numpy(), "specialisation": counts.to_numpy() / tokens}
            parts.append(pd.DataFrame(columns))
        table = pd.concat(parts, ignore_index=True).sort_values(["layer", "expert", "token_id"], ignore_index=True)
        table.attrs = dict(self.settings)
        return table


def _added(first: pd.Series, second: pd.Series) -> pd.Series:
    """The sums of two series of counts by index."""
    return first.add(second, fill_value=0).astype(np.int64)
