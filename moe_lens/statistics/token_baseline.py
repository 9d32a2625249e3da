"""TokenBaseline: how much of an expert's use is told by the token alone, and by the token and the one before it."""

from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import pandas as pd
from scipy import sparse

from moe_lens.errors import MoELensError
from moe_lens.lens.devices import OnDevices, on_cpu, places_of
from moe_lens.lens.needs import Needs
from moe_lens.lens.positions import Positions
from moe_lens.lens.record import Record
from moe_lens.statistics.accumulators import check_alike
from moe_lens.statistics.jackknife import GROUPS, Sums, groups_of, with_interval

SHIFT = 32
"""Bits of a token's id in the number of a bigram."""


class TokenBaseline:
    """The share of the variance of "this token selects expert i" that its id, or its bigram, tells in other examples.

    The ten groups of examples (`groups_of`) are judged one by one by what the nine others say. Of a token x seen n_x
    times there, s_x of them with the expert, p(x) = (s_x + m) / (n_x + 1), where m is the expert's rate there; of a
    bigram b that ends in x, p(b) = (s_b + p(x)) / (n_b + 1). Told is 1 - sum (y - p)^2 / sum (y - m)^2 over the tokens
    judged, y being 1 where the token selects the expert: 1 where the id decides, 0 where it says nothing, and below 0
    where what it seemed to say does not hold.

    positions: which tokens count, as in `Record.position_mask`. bigrams: how many different ones are kept at most.
    Those of the lowest hashes are, whatever the order of the data, and the others are told by their token alone. So
    memory is bounded by vocabulary and bigrams times experts, not by the data.
    """

    def __init__(self, positions: Positions = "all", *, bigrams: int = 2**16) -> None:
        if bigrams < 1:
            raise MoELensError(f"bigrams is how many different ones are kept, at least 1; got {bigrams}")
        self.positions, self.bigrams = positions, bigrams
        self.needs = Needs.of({"routing"}, positions)
        self.settings: dict[str, Any] = {"positions": positions, "bigrams": bigrams}
        self._layers: dict[int, int] = {}  # the experts of each
        self._tokens, self._pairs = _Counts(), _Counts(bigrams)

    def update(self, record: Record) -> Self:
        """Adds a record's tokens; MoELensError for a record without routing or of other layers."""
        record.expect(self.needs.captures)
        self._expect({layer: routing.n_experts for layer, routing in record.routing.items()})
        mask = record.position_mask(self.positions)
        row, position = mask.numpy().nonzero()
        ids = record.token_ids.numpy().astype(np.int64)
        inside = position > record.starts.numpy()[row]
        before = np.where(inside, ids[row, position - 1] + 1, 0)  # 0: nothing stands before
        groups, words = groups_of(record.ids).numpy()[row], ids[row, position]
        places = OnDevices(places_of(mask))
        chosen = on_cpu(places.of(routing.selected().flatten(0, 1)) for routing in record.routing.values())
        selected = sparse.hstack([sparse.csr_array(part.numpy(), dtype=np.int64) for part in chosen], format="csr")
        self._tokens.add(words, groups, selected)
        self._pairs.add((before << SHIFT) + words, groups, selected)
        return self

    def merge(self, other: Self) -> Self:
        """Adds what another statistic of the same settings and model has seen; MoELensError for any other."""
        check_alike(self, other)
        if other._layers:
            self._expect(other._layers)
            self._tokens.merge(other._tokens)
            self._pairs.merge(other._pairs)
        return self

    def state(self) -> pd.DataFrame:
        """What was counted so far, a row for each layer, token and bigram.

        kind, key, group, count (of a layer its experts), and the columns of experts that were selected, how often.
        """
        rows: list[tuple[Any, ...]] = [("layer", layer, 0, count, [], []) for layer, count in self._layers.items()]
        for kind, counts in (("token", self._tokens), ("bigram", self._pairs)):
            rows += [(kind, *row) for row in counts.read().rows()]
        return pd.DataFrame(rows, columns=["kind", "key", "group", "count", "experts", "selected"])

    def add_state(self, state: pd.DataFrame) -> Self:
        """Adds what `state` of another statistic of the same settings and model gave; MoELensError for another."""
        layers = state[state["kind"] == "layer"]
        if len(layers):
            self._expect(dict(zip(layers["key"].tolist(), layers["count"].tolist(), strict=True)))
            for kind, counts in (("token", self._tokens), ("bigram", self._pairs)):
                counts.add_rows(state[state["kind"] == kind], sum(self._layers.values()))
        return self

    def table(self) -> pd.DataFrame:
        """One row per expert: layer, expert, tokens (that count), token and bigram, what each tells, with intervals.

        token_low, token_high, bigram_low, bigram_high: 95 %, over texts (`with_interval`). known_tokens, known_bigrams:
        the share of the tokens judged of which the other examples have the token, the bigram. NaN for an expert that
        was never selected, and where all examples fall into one group. Raises MoELensError if no token counted.
        """
        tokens, pairs = self._tokens.read(), self._pairs.read()
        if not len(tokens):
            raise MoELensError(f"TokenBaseline has seen no token that counts ({self.settings})")
        folds = [_judged(tokens, pairs, group) for group in range(GROUPS)]
        sums = {name: np.stack([fold[name] for fold in folds]) for name in folds[0]}
        told = with_interval(_told, sums, size="count")
        judged = sums["count"].sum() or np.nan
        known = {name: sums[name].sum() / judged for name in ("known_tokens", "known_bigrams")}
        layers = np.concatenate([np.full(count, layer) for layer, count in self._layers.items()])
        experts = np.concatenate([np.arange(count) for count in self._layers.values()])
        columns: dict[str, Any] = {"layer": layers, "expert": experts, "tokens": int(tokens.count.sum())}
        for name, (value, low, high) in told.items():
            columns |= {name: value, f"{name}_low": low, f"{name}_high": high.clip(max=1)}
        table = pd.DataFrame(columns | known)
        table.attrs = dict(self.settings)
        return table

    def _expect(self, layers: dict[int, int]) -> None:
        """MoELensError unless these are the layers, with so many experts, of what was seen so far."""
        if self._layers and self._layers != layers:
            raise MoELensError(f"expected a record of the same model as those so far, {self._layers}; got {layers}")
        self._layers = dict(layers)


class _Read:
    """What was counted: rows of a key and a group, in rising order of both. selected: [row, expert of a layer]."""

    def __init__(self, rows: np.ndarray, count: np.ndarray, selected: "sparse.csr_array") -> None:
        self.keys, self.groups = rows // GROUPS, rows % GROUPS
        self.count, self.selected = count, selected

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self) -> Iterator[tuple[int, int, int, np.ndarray, np.ndarray]]:
        """Key, group, count, and the experts of a layer that were selected, how often."""
        ends, sparse_rows = self.selected.indptr, self.selected
        for row, facts in enumerate(zip(self.keys.tolist(), self.groups.tolist(), self.count.tolist(), strict=True)):
            own = slice(ends[row], ends[row + 1])
            yield *facts, sparse_rows.indices[own].astype(np.int64), sparse_rows.data[own]


class _Counts:
    """How often a key occurs in a group of examples, and with which experts.

    most: of how many keys, those of the lowest hashes; None for all. One that was left out never comes back, since
    there are only ever more that are lower.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._parts: list[tuple[np.ndarray, np.ndarray, sparse.csr_array]] = []

    def add(self, keys: np.ndarray, groups: np.ndarray, selected: "sparse.csr_array") -> None:
        """Adds tokens: their keys and groups [token], and which experts they select, [token, expert of a layer]."""
        if len(keys):
            self._parts.append(_summed(keys * GROUPS + groups, np.ones(len(keys), np.int64), selected))
            sizes = [len(rows) for rows, *_ in self._parts]
            if sum(sizes[1:]) > sizes[0]:  # so that each token is summed a few times only, however many come
                self._sum()

    def add_rows(self, rows: pd.DataFrame, n_experts: int) -> None:
        """Adds the rows of another that was read, with the columns key, group, count, experts and selected."""
        if len(rows):
            lengths = rows["experts"].map(len).to_numpy()
            columns, values = (np.concatenate(rows[name].tolist()).astype(np.int64) for name in ("experts", "selected"))
            place = np.repeat(np.arange(len(rows)), lengths)
            selected = sparse.csr_array((values, (place, columns)), (len(rows), n_experts))
            keys, groups, count = (rows[name].to_numpy(np.int64) for name in ("key", "group", "count"))
            self._parts.append((keys * GROUPS + groups, count, selected))
            self._sum()

    def merge(self, other: "_Counts") -> None:
        """Adds what another has counted."""
        self._parts += other._parts
        self._sum()

    def read(self) -> _Read:
        """What was counted."""
        self._sum()
        return _Read(*self._parts[0]) if self._parts else _Read(*(np.zeros(0, np.int64),) * 2, sparse.csr_array((0, 0)))

    def _sum(self) -> None:
        if not self._parts:
            return
        rows, count, selected = (list(part) for part in zip(*self._parts, strict=True))
        summed = _summed(np.concatenate(rows), np.concatenate(count), sparse.vstack(selected, format="csr"))
        self._parts = [_lowest(summed, self._most)]


def _summed(
    rows: np.ndarray, count: np.ndarray, selected: "sparse.csr_array"
) -> tuple[np.ndarray, np.ndarray, "sparse.csr_array"]:
    """Rows of one number as one, in rising order."""
    own, inverse = np.unique(rows, return_inverse=True)
    gather = sparse.csr_array((np.ones(len(rows), np.int64), (inverse, np.arange(len(rows)))), (len(own), len(rows)))
    return own, gather @ count, gather @ selected


def _lowest(
    counted: tuple[np.ndarray, np.ndarray, "sparse.csr_array"], most: int | None
) -> tuple[np.ndarray, np.ndarray, "sparse.csr_array"]:
    """The rows of the `most` keys whose hashes are lowest."""
    rows, count, selected = counted
    keys = np.unique(rows // GROUPS)
    if most is None or len(keys) <= most:
        return counted
    kept = keys[np.argsort(_hashed(keys), kind="stable")[:most]]
    there = np.isin(rows // GROUPS, kept)
    return rows[there], count[there], selected[there]


def _hashed(keys: np.ndarray) -> np.ndarray:
    """A number of 64 bits for each key, scattered evenly and different for each (the finisher of splitmix64)."""
    mixed = keys.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def _judged(tokens: _Read, pairs: _Read, group: int) -> dict[str, np.ndarray]:
    """Of the tokens in one group, judged by those in the others, sums of squared errors [expert of a layer].

    none: of the rate there. token, bigram: of what each tells. count, known_tokens, known_bigrams: tokens, as [1].
    """
    word, pair = (_Fold(counts, group) for counts in (tokens, pairs))
    fitted = tokens.count[tokens.groups != group].sum()
    if not fitted or not len(word.keys):
        nothing = np.zeros(tokens.selected.shape[1])
        count = np.array([word.count.sum() if fitted else 0])
        zeros = dict.fromkeys(("known_tokens", "known_bigrams"), np.zeros(1))
        return dict.fromkeys(("none", "token", "bigram"), nothing) | zeros | {"count": count}
    rate = (tokens.selected.sum(0) - word.selected.sum(0)) / fitted
    by_token = (word.fit_selected + rate) / (word.fit_count + 1)[:, None]
    last = np.searchsorted(word.keys, pair.keys & ((1 << SHIFT) - 1))  # the token in which each bigram ends
    by_pair = (pair.fit_selected + by_token[last]) / (pair.fit_count + 1)[:, None]
    errors = _errors(word.count, word.selected, by_token)
    better = _errors(pair.count, pair.selected, by_pair) - _errors(pair.count, pair.selected, by_token[last])
    return {
        "none": _errors(word.count, word.selected, rate),
        "token": errors,
        "bigram": errors + better,
        "count": np.array([word.count.sum()]),
        "known_tokens": np.array([word.count[word.fit_count > 0].sum()]),
        "known_bigrams": np.array([pair.count[pair.fit_count > 0].sum()]),
    }


class _Fold:
    """The keys of a group of examples, in rising order, with what the group and what the others have of each."""

    def __init__(self, counts: _Read, group: int) -> None:
        own = counts.groups == group
        self.keys, self.count, self.selected = counts.keys[own], counts.count[own], counts.selected[own].toarray()
        others = ~own & np.isin(counts.keys, self.keys)
        place, rows = np.searchsorted(self.keys, counts.keys[others]), np.flatnonzero(others)
        gather = sparse.csr_array((np.ones(len(rows), np.int64), (place, rows)), (len(self.keys), len(counts)))
        self.fit_count, self.fit_selected = gather @ counts.count, (gather @ counts.selected).toarray()


def _errors(count: np.ndarray, selected: np.ndarray, told: np.ndarray) -> np.ndarray:
    """The sum of (y - p)^2 over tokens, [expert of a layer], of their number [row] and those with y = 1, [row, expert].

    told: p, [row, expert] or [expert].
    """
    summed: np.ndarray = (selected * (1 - 2 * told) + count[:, None] * np.square(told)).sum(0)
    return summed


def _told(sums: Sums) -> dict[str, np.ndarray]:
    """What token and bigram tell: what their errors leave of those of the rate, as a share, [expert of a layer]."""
    none = sums["none"]
    left = {
        name: np.divide(sums[name], none, out=np.full(none.shape, np.nan), where=none > 0)
        for name in ("token", "bigram")
    }
    return {name: 1 - own for name, own in left.items()}
