"""TopContexts: the places in the data where each expert has the highest gating weight, with the tokens around them."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Self
from zlib import crc32

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from moe_lens.errors import MoELensError
from moe_lens.lens.devices import on_cpu
from moe_lens.lens.needs import Needs
from moe_lens.lens.positions import Positions
from moe_lens.lens.record import Record
from moe_lens.routing import Routing
from moe_lens.statistics.accumulators import check_alike

ALIKE = 4
"""Places whose last so many tokens are the same are shown once: a prompt's fixed words are in every example."""

Words = tuple[int, ...]


class Place(NamedTuple):
    """A token that selects an expert; the first two order places, the highest weight first, then by the id's crc32."""

    below: float  # minus the gating weight
    tie: int
    position: int  # of the token in its prompt
    id: str
    tokens: list[int]  # around it
    weights: list[float]  # the expert's at each
    place: int  # of the token among them


class TopContexts:
    """The `size` places at which an expert has its highest gating weights, no two with the same last four tokens.

    before, after: how many tokens around the one that selects it are kept, with the expert's weight at each.
    positions: which tokens count, as in `Record.position_mask`.

    Of places with the same last tokens the one of the highest weight is kept. Where weights are not known all are 1, so
    that the example's id decides. The order of the data does not matter, and what is kept does not grow with them.
    """

    def __init__(self, size: int = 6, *, before: int = 24, after: int = 8, positions: Positions = "all") -> None:
        if size < 1 or before < 0 or after < 0:
            raise MoELensError(f"size is at least 1, before and after at least 0; got {size}, {before}, {after}")
        self.size, self.before, self.after, self.positions = size, before, after, positions
        self.needs = Needs.of({"routing"}, positions)
        self.settings: dict[str, Any] = {"size": size, "before": before, "after": after, "positions": positions}
        self._kept: dict[int, list[dict[Words, Place]]] = {}  # by layer and expert

    def update(self, record: Record) -> Self:
        """Adds a record's samples; MoELensError for a record without routing or of other layers."""
        record.expect(self.needs.captures)
        self._expect({layer: routing.n_experts for layer, routing in record.routing.items()})
        counted = record.position_mask(self.positions).numpy()
        found = iter(on_cpu(part for one in record.routing.values() for part in (one.indices, _weights(one))))
        for layer, routing in record.routing.items():
            weights = _dense(routing, next(found), next(found))  # [expert, batch, pos]
            for kept, own in zip(self._kept[layer], weights, strict=True):
                self._add(kept, self._places(record, own, counted, self._least(kept)))
        return self

    def merge(self, other: Self) -> Self:
        """Adds what another statistic of the same settings and model has seen; MoELensError for any other."""
        check_alike(self, other)
        if other._kept:
            self._expect({layer: len(experts) for layer, experts in other._kept.items()})
        for layer, experts in other._kept.items():
            for kept, more in zip(self._kept[layer], experts, strict=True):
                self._add(kept, iter(sorted(more.items(), key=lambda item: item[1])))
        return self

    def state(self) -> pd.DataFrame:
        """The places so far: layer, experts (of that layer), expert, words (the last of its tokens), and the place."""
        rows = [
            (layer, len(experts), expert, list(words), *place)
            for layer, experts in self._kept.items()
            for expert, kept in enumerate(experts)
            for words, place in kept.items()
        ]
        return pd.DataFrame(rows, columns=["layer", "experts", "expert", "words", *Place._fields])

    def add_state(self, state: pd.DataFrame) -> Self:
        """Adds what `state` of another statistic of the same settings and model gave; MoELensError for another."""
        if len(state):
            self._expect(dict(zip(state["layer"].tolist(), state["experts"].tolist(), strict=True)))
        for (layer, expert), rows in state.groupby(["layer", "expert"]):
            facts = (rows[name].tolist() for name in Place._fields)
            found = [
                Place(*place)._replace(tokens=list(place[4]), weights=list(place[5]))
                for place in zip(*facts, strict=True)
            ]
            places = zip((tuple(map(int, words)) for words in rows["words"]), found, strict=True)
            self._add(self._kept[layer][expert], iter(sorted(places, key=lambda item: item[1])))
        return self

    def table(self) -> pd.DataFrame:
        """One row per expert and place, from the highest weight down.

        Columns: layer, expert, rank (from 0), id (of the example), position (of the token in its prompt), weight (the
        expert's there), place (of that token among the tokens around it), token_ids and weights, lists of these tokens
        and of the expert's weight at each, 0 where it was not selected. Raises MoELensError if no token counted.
        """
        rows = [
            (layer, expert, rank, one.id, one.position, -one.below, one.place, one.tokens, one.weights)
            for layer, experts in sorted(self._kept.items())
            for expert, kept in enumerate(experts)
            for rank, one in enumerate(sorted(kept.values()))
        ]
        if not rows:
            raise MoELensError(f"TopContexts has seen no token that counts ({self.settings})")
        names = ["layer", "expert", "rank", "id", "position", "weight", "place", "token_ids", "weights"]
        table = pd.DataFrame(rows, columns=names)
        table.attrs = dict(self.settings)
        return table

    def _least(self, kept: dict[Words, Place]) -> float:
        """The weight below which no place can enter any more."""
        return -max(kept.values()).below if len(kept) == self.size else 0.0

    def _places(
        self, record: Record, weights: np.ndarray, counted: np.ndarray, least: float
    ) -> Iterator[tuple[Words, Place]]:
        """A record's places of one expert, in their order. weights: [batch, pos], -1 where it was not selected."""
        rows, columns = np.nonzero(counted & (weights >= least))
        starts, token_ids = record.starts.numpy(), record.token_ids
        ties = np.array([crc32(str(name).encode()) for name in record.ids])
        for n in np.lexsort((columns - starts[rows], ties[rows], -weights[rows, columns])):
            row, column, start = rows[n], columns[n], starts[rows[n]]
            first, end = max(start, column - self.before), column + 1 + self.after
            last = token_ids[row, max(start, column + 1 - ALIKE) : column + 1]
            own = record.attention_mask[row, first:end].bool()
            tokens, around = token_ids[row, first:end][own].tolist(), weights[row, first:end].clip(0)
            facts = float(-weights[row, column]), int(ties[row]), int(column - start), record.ids[row]
            yield tuple(last.tolist()), Place(*facts, tokens, around[own.numpy()].tolist(), int(column - first))

    def _add(self, kept: dict[Words, Place], places: Iterator[tuple[Words, Place]]) -> None:
        """Keeps the best of both; places come in their order, so that after `size` different ones no more can enter."""
        seen: set[Words] = set()
        for words, place in places:
            if words not in seen:
                seen.add(words)
                kept[words] = min(place, kept.get(words, place))
            if len(seen) == self.size:
                break
        for words in sorted(kept, key=lambda name: kept[name])[self.size :]:
            del kept[words]

    def _expect(self, layers: dict[int, int]) -> None:
        """MoELensError unless these are the layers, with so many experts, of what was seen so far."""
        if not self._kept:
            self._kept = {layer: [{} for _ in range(count)] for layer, count in layers.items()}
        own = {layer: len(experts) for layer, experts in self._kept.items()}
        if own != layers:
            raise MoELensError(f"expected a record of the same model as those so far, {own}; got {layers}")


def _weights(routing: Routing) -> Tensor:
    """The gating weights [batch, pos, k]; 1 where they are not known."""
    return routing.weights if routing.has_weights else torch.ones(routing.indices.shape, device=routing.indices.device)


def _dense(routing: Routing, indices: Tensor, weights: Tensor) -> np.ndarray:
    """The weight of every expert at every token, [expert, batch, pos]; -1 where it was not selected."""
    none = torch.full((*indices.shape[:2], routing.n_experts), -1.0)
    return none.scatter(-1, indices, weights.float()).permute(2, 0, 1).numpy()
