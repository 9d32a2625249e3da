"""ExpertSet: an immutable choice of experts per layer, with set algebra, selection rules and text forms."""

import json
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from moe_lens.errors import MoELensError

LITERAL_FORM = "'layer:expert,expert;layer:expert', for example '3:5,7;4:0'"
DECIMALS = 4
"""Of the scores that ESFT publishes and chooses by."""


@dataclass(frozen=True)
class ExpertSet:
    """Which experts of which layers; equal choices compare and hash equal.

    Build one with `ExpertSet.of({layer: ids})`, which sorts, removes repeats and drops empty layers.
    Layers are absolute decoder indices. Iteration gives (layer, expert) pairs in rising order and `len`
    counts them; `experts[layer]` gives a layer's ids, an empty tuple where there are none.

    >>> ce = ExpertSet.of({3: [7, 5], 4: [0]})
    >>> str(ce), ce[3], (4, 0) in ce, len(ce)
    ('3:5,7;4:0', (5, 7), True, 3)
    """

    members: tuple[tuple[int, tuple[int, ...]], ...] = ()

    def __post_init__(self) -> None:
        pairs = self.members if isinstance(self.members, tuple) else [None]
        if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], tuple) for pair in pairs):
            raise MoELensError(f"make a set with ExpertSet.of({{3: [5, 7]}}) or .parse('3:5,7'); got {self.members!r}")

    @classmethod
    def of(cls, layers: Mapping[int, Iterable[int]]) -> "ExpertSet":
        """The set of the given expert ids per layer; MoELensError for an id that is no whole number >= 0."""
        ids = {_index(layer, "layer"): {_index(e, "expert") for e in layers[layer]} for layer in layers}
        return cls(tuple((layer, tuple(sorted(ids[layer]))) for layer in sorted(ids) if ids[layer]))

    @classmethod
    def top(cls, table: pd.DataFrame, size: int, *, score: str = "score") -> "ExpertSet":
        """The `size` experts of each layer with the highest score; of equal scores the lower id wins.

        table: one row per expert with columns `layer`, `expert` and the one named by `score`.
        Raises MoELensError if a column is missing, a row repeated, a score not finite, or a layer has
        fewer than `size` experts.
        """
        ranked = _ranked(table, score)
        smallest = min(len(ids) for ids, _ in ranked.values())
        if not 1 <= size <= smallest:
            raise MoELensError(f"size must lie between 1 and {smallest}, the experts per layer; got {size}")
        return cls.of({layer: ids[:size] for layer, (ids, _) in ranked.items()})

    @classmethod
    def cumulative(cls, table: pd.DataFrame, p: float, *, score: str = "score") -> "ExpertSet":
        """ESFT's choice: per layer the experts of `cumulative_order`, as a set."""
        return cls.of(cumulative_order(table, p, score=score))

    @classmethod
    def random_like(cls, other: "ExpertSet", seed: int, *, n_experts: int) -> "ExpertSet":
        """As many experts in each layer as `other` has, drawn uniformly from all `n_experts`.

        A layer's draw depends on `seed` and the layer only, so a set restricted to some layers gets the
        same control there. Raises MoELensError if `other` has an id that is no expert of such a layer.
        """
        beyond = [(layer, expert) for layer, expert in other if expert >= n_experts]
        if beyond:
            raise MoELensError(f"expert ids must be below n_experts = {n_experts}; got {beyond}")
        return cls.of(
            {
                layer: np.random.default_rng((seed, layer)).choice(n_experts, size=len(ids), replace=False)
                for layer, ids in other.members
            }
        )

    @classmethod
    def parse(cls, text: str) -> "ExpertSet":
        """The set written as '3:5,7;4:0', which is what `str` gives; MoELensError for anything else."""
        layers = {}
        for part in filter(None, text.strip().split(";")):
            layer, _, ids = part.partition(":")
            try:
                key, experts = int(layer), [int(expert) for expert in ids.split(",")]
            except ValueError:
                raise MoELensError(f"expected experts as {LITERAL_FORM}; cannot read {part!r}") from None
            if key in layers:
                raise MoELensError(f"layer {key} is named twice in {text!r}; write its experts in one place")
            layers[key] = experts
        return cls.of(layers)

    @classmethod
    def from_json(cls, text: str) -> "ExpertSet":
        """The set from a JSON object like {"3": [5, 7]}, expert ids per layer; else MoELensError."""
        try:
            layers = json.loads(text, object_pairs_hook=_without_repeats)
        except MoELensError:
            raise
        except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and lists in lists
            raise MoELensError(f'expected experts as JSON, like {{"3": [5, 7]}}: {error}') from None
        if not isinstance(layers, dict) or not all(isinstance(ids, list) for ids in layers.values()):
            raise MoELensError(f'expected a JSON object like {{"3": [5, 7]}}; got {text[:80]}')
        wrong = [layer for layer in layers if not re.fullmatch(r"[0-9]{1,9}", layer)]
        if wrong:
            raise MoELensError(f"the keys must be layer numbers; got {wrong}")
        return cls.of(_without_repeats([(int(layer), ids) for layer, ids in layers.items()]))  # "3" and "03" repeat

    def to_json(self) -> str:
        """A JSON object of expert ids per layer."""
        return json.dumps({str(layer): list(ids) for layer, ids in self.members})

    def __repr__(self) -> str:
        return f"ExpertSet({self.brief()})"

    def brief(self) -> str:
        """The set as text where that is short, else how large it is."""
        text = str(self)
        return repr(text) if len(text) <= 60 else f"{len(self)} experts in {len(self.members)} layers"

    def __str__(self) -> str:
        return ";".join(f"{layer}:{','.join(map(str, ids))}" for layer, ids in self.members)

    def __getitem__(self, layer: int) -> tuple[int, ...]:
        return dict(self.members).get(layer, ())

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((layer, expert) for layer, ids in self.members for expert in ids)

    def __len__(self) -> int:
        return sum(len(ids) for _, ids in self.members)

    def __contains__(self, pair: tuple[int, int]) -> bool:
        layer, expert = pair
        return expert in self[layer]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have members, in rising order."""
        return tuple(layer for layer, _ in self.members)

    def restrict(self, layers: Iterable[int]) -> "ExpertSet":
        """The members in the given layers."""
        kept = set(layers)
        return ExpertSet(tuple((layer, ids) for layer, ids in self.members if layer in kept))

    def __or__(self, other: "ExpertSet") -> "ExpertSet":
        return _of_pairs({*self, *other})

    def __and__(self, other: "ExpertSet") -> "ExpertSet":
        return _of_pairs(set(self) & set(other))

    def __sub__(self, other: "ExpertSet") -> "ExpertSet":
        return _of_pairs(set(self) - set(other))

    def overlap(self, other: "ExpertSet") -> float:
        """The share of members that both sets have; MoELensError unless they are equally large, not empty."""
        if len(self) != len(other) or not self:
            raise MoELensError(f"overlap needs equally large sets; got {len(self)} and {len(other)} members")
        return len(self & other) / len(self)

    def jaccard(self, other: "ExpertSet") -> float:
        """The Jaccard index: the members that both sets have over those that one of them has; NaN of two empty sets."""
        return len(self & other) / len(self | other) if self or other else float("nan")


def cumulative_order(table: pd.DataFrame, p: float, *, score: str = "score") -> dict[int, tuple[int, ...]]:
    """Per layer the experts ESFT trains, in falling order of score: taken while the sum so far is below `p`.

    The expert whose score crosses `p` is still in. Scores are compared and added up at the 4 decimals that ESFT
    publishes and chooses by; of equal ones the lower id comes first.

    table: one row per expert with columns `layer`, `expert` and the one named by `score`.
    Raises MoELensError for `p` outside (0, 1] and for a table that `ExpertSet.top` would refuse.
    """
    if not 0 < p <= 1:
        raise MoELensError(f"p is a share of the summed score, above 0 and at most 1; got {p}")
    orders = {}
    for layer, (ids, scores) in _ranked(table.assign(**{score: table[score].round(DECIMALS)}), score).items():
        sum_before = np.concatenate([[0.0], np.cumsum(scores)[:-1]]).round(DECIMALS)
        orders[layer] = tuple(ids[sum_before < p].tolist())
    return orders


def expect_experts(value: object) -> None:
    """MoELensError unless `value` is an ExpertSet."""
    if not isinstance(value, ExpertSet):
        raise MoELensError(
            f"expected an ExpertSet, such as ExpertSet.of({{3: [5, 7]}}) or ExpertSet.parse('3:5,7'); got {value!r}"
        )


def _ranked(table: pd.DataFrame, score: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Per layer the expert ids [expert] and scores [expert] in falling order of score, then rising id."""
    missing = [column for column in ("layer", "expert", score) if column not in table.columns]
    if missing:
        raise MoELensError(f"the table lacks the column(s) {missing}; it has {list(table.columns)}")
    if table.empty:
        raise MoELensError("expected a table of scores with a row per expert; it has no rows")
    if table.duplicated(["layer", "expert"]).any():
        raise MoELensError("expected one row per layer and expert; some rows repeat: filter the table")
    if not np.isfinite(table[score]).all():
        raise MoELensError(f"column {score!r} holds scores that are not finite, which have no rank")
    ordered = table.sort_values(["layer", score, "expert"], ascending=[True, False, True])
    return {
        int(layer): (rows["expert"].to_numpy(), rows[score].to_numpy(dtype=np.float64))
        for layer, rows in ordered.groupby("layer")
    }


def _of_pairs(pairs: Iterable[tuple[int, int]]) -> ExpertSet:
    layers: dict[int, list[int]] = {}
    for layer, expert in pairs:
        layers.setdefault(layer, []).append(expert)
    return ExpertSet.of(layers)


def _index(number: int, what: str) -> int:
    try:
        value = operator.index(number)
    except TypeError:
        raise MoELensError(f"expected whole numbers for the {what}s; got {number!r}") from None
    if value < 0:
        raise MoELensError(f"{what} numbers start at 0; got {value}")
    return value


def _without_repeats(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise MoELensError(f"each layer may be named once; got {names}")
    return dict(pairs)
