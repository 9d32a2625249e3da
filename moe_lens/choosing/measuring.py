"""Measuring scores: one pass over the examples for each model that they are about, and the tables kept."""

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from moe_lens.choosing.contrast import load_prompts
from moe_lens.choosing.procedures import Examples, Load, Parted, Procedure
from moe_lens.choosing.scores import Score
from moe_lens.errors import MoELensError
from moe_lens.lens.delta import with_delta
from moe_lens.lens.lens import MoELens
from moe_lens.lens.needs import Statistic
from moe_lens.lens.parallel import agreed
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
    examples: Examples,
    *,
    out: Path | None = None,
    made_by: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    load: Load = load_prompts,
) -> dict[str, pd.DataFrame]:
    """The score of every expert, by the score's name: columns layer, expert, score.

    Those that come with an interval have score_low and score_high too. Every statistic is measured once, in one pass
    for each model; procedures share theirs.
    out, made_by: a folder in which each score is kept as score-NAME.parquet under this provenance; one that is there
        already, made in the same way, is not measured again. MoELensError for the one without the other.
    load: gives the examples of data that a score names itself, as contrast(novel;swap) does.
    In a `sharing` block of moe_lens.lens.parallel the processes share statistics, attributions and single effects; the
    first one keeps the tables, and all get them.
    """
    if (out is None) != (made_by is None):
        raise MoELensError(
            "out and made_by belong together: a kept score is told from others by models, template and examples; give "
            "both, such as made_by=moe_lens.results.provenance(model=…, data=examples), or neither"
        )
    load = cache(load)
    wanted = list(dict.fromkeys(scores))
    files = {score: None if out is None else out / _file(score) for score in wanted}
    told = {score: {**(made_by or {}), **_facts(score, load)} for score in wanted}
    absent = agreed(lambda: [n for n, one in enumerate(wanted) if read_if_made_by(files[one], told[one]) is None])
    missing = [wanted[place] for place in absent]

    @cache
    def measured() -> tuple[_Tables, _Tables]:
        of_base, of_tuned = ([one for one in missing if one.needs_base], [one for one in missing if one.needs_tuned])
        return (
            _measure(models.base, of_base, examples, batch_size, load)[0],
            _measure(models.tuned, of_tuned, examples, batch_size, load)[0],
        )

    def one(score: Score) -> pd.DataFrame:
        found = kept(files[score], told[score], lambda: _table(score, *measured()))
        return found.drop(columns="name")

    if missing:
        measured()
    return agreed(lambda: {score.name: one(score) for score in wanted})


def tables_on_parts(
    scores: Collection[Score],
    models: Models,
    examples: Examples,
    *,
    parts: int,
    batch_size: int | None = None,
    load: Load = load_prompts,
) -> list[dict[str, pd.DataFrame]]:
    """`score_tables` of all examples, and after it of each of the parts `examples[n::parts]`, by the same passes.

    For scores whose `is_parted` says so; a part has one example or more.
    """
    base = _measure(models.base, [one for one in scores if one.needs_base], examples, batch_size, load, parts)
    tuned = _measure(models.tuned, [one for one in scores if one.needs_tuned], examples, batch_size, load, parts)
    return [
        {score.name: _table(score, *both).drop(columns="name") for score in scores}
        for both in zip(base, tuned, strict=True)
    ]


def is_parted(score: Score) -> bool:
    """Whether what a score is on parts of the examples comes from the passes over all of them."""
    source = score.measured_by()
    return isinstance(source, Parted) or not isinstance(source, Procedure)


def passes_of(scores: Iterable[Score], lens: MoELens, examples: Examples, load: Load) -> float:
    """About how many times measuring these scores sends the examples' tokens through the model that `lens` is of."""
    statistics, procedures = _sources(scores)
    kinds: dict[type[Procedure], list[Any]] = {}
    for source in procedures.values():
        kinds.setdefault(type(source), []).append(source)
    return bool(statistics) + sum(kind.passes(own, lens, examples, load=load) for kind, own in kinds.items())


_Tables = Mapping[tuple[str, str], pd.DataFrame]


def _measure(
    opened: Opened,
    scores: Collection[Score],
    examples: Examples,
    batch_size: int | None,
    load: Load,
    parts: int = 1,
) -> list[_Tables]:
    """The tables of what these scores are taken from: of all statistics in one pass, of procedures kind by kind.

    Of all examples, and after it, of more parts than one, of each.
    """
    tables: list[dict[tuple[str, str], pd.DataFrame]] = [{} for _ in range(1 + (parts if parts > 1 else 0))]
    if not scores:
        return [*tables]
    statistics, procedures = _sources(scores)
    with opened() as lens:
        if statistics:
            for own, found in zip(tables, _statistics(lens, scores, examples, batch_size, parts), strict=True):
                own |= found
        for kind in dict.fromkeys(name for name, _ in procedures):
            keys = [key for key in procedures if key[0] == kind]
            wanted = [procedures[key] for key in keys]
            if parts > 1:
                parted = [one for one in wanted if isinstance(one, Parted)]
                made = type(parted[0]).tables_on_parts(parted, lens, examples, parts=parts, batch_size=batch_size)
            else:
                made = [type(wanted[0]).tables(wanted, lens, examples, load=load, batch_size=batch_size)]
            for own, each in zip(tables, made, strict=True):
                own |= dict(zip(keys, each, strict=True))
    return [*tables]


def _statistics(
    lens: MoELens, scores: Collection[Score], examples: Examples, batch_size: int | None, parts: int
) -> list[_Tables]:
    """The tables of statistics, on all examples and on each part; what is measured on the parts is merged for all."""
    measured = []
    for number in range(parts):
        statistics, _ = _sources(scores)
        found = lens.measure(examples[number::parts], *statistics.values(), batch_size=batch_size)
        measured.append(dict(zip(statistics, found, strict=True)))
    each = [{key: one.table() for key, one in own.items()} for own in measured] if parts > 1 else []
    whole, *others = measured
    for own in others:
        for key, one in own.items():
            whole[key].merge(one)
    return [{key: one.table() for key, one in whole.items()}, *each]


def _sources(
    scores: Iterable[Score],
) -> tuple[dict[tuple[str, str], Statistic], dict[tuple[str, str], Procedure]]:
    """What scores are taken from, each once: new statistics, and procedures."""
    sources = {_key(source): source for source in (score.measured_by() for score in scores)}
    procedures = {key: source for key, source in sources.items() if isinstance(source, Procedure)}
    return {key: source for key, source in sources.items() if not isinstance(source, Procedure)}, procedures


def _facts(score: Score, load: Load) -> dict[str, Any]:
    """What tells a score from others, also from one that had its name before."""
    source = score.measured_by()
    measured = {"of": score.of, "statistic": _key(source), "column": score.column}
    own = {"measured": source.facts(load)} if isinstance(source, Procedure) else {}
    return {"score": score.name, "about": score.about, **measured, **own}


def _file(score: Score) -> str:
    """A file name, different for different scores."""
    plain = re.sub(r"[^\w.-]+", "_", score.name)
    digest = "" if plain == score.name else "-" + hashlib.sha256(score.name.encode()).hexdigest()[:8]
    return f"score-{plain[:60]}{digest}.parquet"


def _key(source: Statistic | Procedure) -> tuple[str, str]:
    """What tells a statistic or procedure from others."""
    return type(source).__name__, repr(sorted(source.settings.items()))


def _table(score: Score, base: _Tables, tuned: _Tables) -> pd.DataFrame:
    """The score of every expert: columns layer, expert, score, name. base, tuned: the statistics' tables."""
    key = _key(score.measured_by())
    table = (base if score.of == "base" else tuned)[key]
    found = table[["layer", "expert"]].assign(score=table[score.column], name=score.name)
    if score.of == "gain":
        return found.assign(score=found["score"] - base[key][score.column])
    source = score.measured_by()
    beside = {name: table[name] for name in source.beside} if isinstance(source, Procedure) else {}
    ends = {
        f"score_{end}": table[f"{score.column}_{end}"] for end in ("low", "high") if f"{score.column}_{end}" in table
    }
    return found.assign(**ends, **beside)
