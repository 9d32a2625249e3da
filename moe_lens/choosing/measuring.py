"""Measuring scores: one pass over the examples for each model that they are about, and the tables kept."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from moe_lens.choosing.scores import Score
from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.lens.delta import with_delta
from moe_lens.lens.lens import MoELens
from moe_lens.lens.needs import Statistic
from moe_lens.results import kept, read_if_made_by

Opened = Callable[[], AbstractContextManager[MoELens]]


@dataclass(frozen=True)
class Models:
    """The models that scores are about, each a block that gives its lens, entered only where a score asks for it."""

    base: Opened
    tuned: Opened

    @classmethod
    def opened(cls, base: MoELens | Callable[[], MoELens], tuned: MoELens) -> "Models":
        """Two models of which the tuned one is open; the base one too, or opened where a score asks for it."""
        return cls(
            base=lambda: nullcontext(base if isinstance(base, MoELens) else base()), tuned=lambda: nullcontext(tuned)
        )

    @classmethod
    def with_delta(cls, lens: MoELens, folder: Path) -> "Models":
        """One model, the base, which is tuned while it has the delta of a folder."""

        @contextmanager
        def tuned() -> Iterator[MoELens]:
            with with_delta(lens.module, folder, template=lens.template):
                yield lens

        return cls(base=lambda: nullcontext(lens), tuned=tuned)


def score_tables(
    scores: Iterable[Score],
    models: Models,
    examples: Sequence[Example],
    *,
    out: Path | None = None,
    made_by: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
) -> dict[str, pd.DataFrame]:
    """The score of every expert, by the score's name: columns layer, expert, score.

    Every statistic is measured once, in one pass for each model.
    out, made_by: a folder in which each score is kept as score-NAME.parquet under this provenance; one that is there
        already, made in the same way, is not measured again. MoELensError for the one without the other.
    """
    if (out is None) != (made_by is None):
        raise MoELensError(
            "out and made_by belong together: a kept score is told from others by models, template and examples; give "
            "both, such as made_by=moe_lens.results.provenance(model=…, data=examples), or neither"
        )
    wanted = list(dict.fromkeys(scores))
    files = {score: None if out is None else out / f"score-{score.name}.parquet" for score in wanted}
    told = {score: {**(made_by or {}), **_facts(score)} for score in wanted}
    missing = [score for score in wanted if read_if_made_by(files[score], told[score]) is None]

    @cache
    def measured() -> tuple[_Tables, _Tables]:
        return (
            _measure(models.base, [score for score in missing if score.needs_base], examples, batch_size),
            _measure(models.tuned, [score for score in missing if score.needs_tuned], examples, batch_size),
        )

    def one(score: Score) -> pd.DataFrame:
        found = kept(files[score], told[score], lambda: _table(score, *measured()))
        return found.drop(columns="name")

    return {score.name: one(score) for score in wanted}


_Tables = Mapping[tuple[str, str], pd.DataFrame]


def _measure(opened: Opened, scores: Collection[Score], examples: Sequence[Example], batch_size: int | None) -> _Tables:
    """The tables of the statistics that these scores are taken from, each measured once, in one pass."""
    if not scores:
        return {}
    statistics = {_key(statistic): statistic for statistic in (score.statistic() for score in scores)}
    with opened() as lens:
        found = lens.measure(examples, *statistics.values(), batch_size=batch_size)
    return {key: statistic.table() for key, statistic in zip(statistics, found, strict=True)}


def _facts(score: Score) -> dict[str, Any]:
    """What tells a score from others, also from one that had its name before."""
    measured = {"of": score.of, "statistic": _key(score.statistic()), "column": score.column}
    return {"score": score.name, "about": score.about, **measured}


def _key(statistic: Statistic) -> tuple[str, str]:
    """What tells a statistic from others."""
    return type(statistic).__name__, repr(sorted(statistic.settings.items()))


def _table(score: Score, base: _Tables, tuned: _Tables) -> pd.DataFrame:
    """The score of every expert: columns layer, expert, score, name. base, tuned: the statistics' tables."""
    key = _key(score.statistic())
    table = (base if score.of == "base" else tuned)[key]
    values = table[score.column]
    if score.of == "gain":
        values = values - base[key][score.column]
    return table[["layer", "expert"]].assign(score=values, name=score.name)
