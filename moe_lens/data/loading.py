"""Loading examples: the organism's tasks, named data sets, files of rows, and any data set of the hub."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import islice
from pathlib import Path

from moe_lens.data.example import Example
from moe_lens.data.files import ENDINGS, Records, ending, read_rows
from moe_lens.data.rows import check_columns, example_of, rename
from moe_lens.data.source import Source, carve
from moe_lens.data.sources import confiqa, counterfact, gigaword, hotpotqa, memotrap, mmlu, mrqa, nq_swap, squad
from moe_lens.errors import MoELensError

ORGANISM_TASKS = ("swap", "novel", "consistent", "hops", "closed_book", "summary")
SOURCES = {
    source.name: source
    for source in (
        squad.SOURCE,
        mrqa.NQ,
        hotpotqa.SOURCE,
        nq_swap.SOURCE,
        *confiqa.SOURCES,
        counterfact.SOURCE,
        memotrap.SOURCE,
        gigaword.SOURCE,
        mmlu.SOURCE,
    )
}
PLAIN = ("context", "question", "answer")


@dataclass(frozen=True)
class Loaded:
    """What `read_examples` found.

    rows: how many were read for the examples. bad: for each row that makes no example its place and what is wrong.
    """

    examples: list[Example]
    rows: int
    bad: tuple[str, ...]


def load_examples(
    spec: str | Path,
    *,
    split: str = "test",
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    skip_bad: bool = False,
) -> list[Example]:
    """The first `limit` examples (all by default) of a task, a data set or a file.

    spec: one of
        swap, novel, … a task of the organism
        NAME           a data set, from the hub at a pinned revision: squad, nq, hotpotqa, nq-swap, counterfact,
                       memotrap, mmlu
        NAME:PATH      the same (also confiqa-qa, confiqa-mr, confiqa-mc, gigaword) from a file in its original format,
                       or from a folder that has the file of each split, by its original name or as SPLIT.json, …
        PATH           a .json, .jsonl, .csv, .tsv or .parquet file of rows (the text ones also gzipped)
        ID, ID@REVISION, ID/CONFIG@REVISION, FOLDER: whatever `datasets` can load
    split: of a task, data set or folder; a file has none and is taken whole.
    columns: the names that a row's fields have, such as {"question": "query", "answer": "gold.text"}.
    skip_bad: leave out rows that make no example, with a warning that counts them and quotes the first;
        `read_examples` gives them all.

    A row has `context` ("" for closed-book), `question`, `answer` (a text or a list of them) and may have `id` (else
    its number, from 0), `original_answer` and `options`; files of a named data set may have such rows too.
    Raises MoELensError for anything else, naming the row, and for ids that repeat.
    """
    loaded = read_examples(spec, split=split, limit=limit, columns=columns, skip_bad=skip_bad)
    if loaded.bad:
        counted = f"left out {len(loaded.bad)} bad rows of {loaded.rows}; the first: {loaded.bad[0]}"
        warnings.warn(f"{spec}: {counted}", stacklevel=2)
    return loaded.examples


def read_examples(
    spec: str | Path,
    *,
    split: str = "test",
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    skip_bad: bool = False,
) -> Loaded:
    """As `load_examples`, with the rows that `skip_bad` leaves out."""
    if limit is not None and limit < 1:
        raise MoELensError(f"limit is a number of examples, at least 1; got {limit}")
    check_columns(columns or {})
    name, _, path = str(spec).partition(":")
    source = SOURCES.get(name)
    if source is None:
        records = _unnamed(str(spec), split, streaming=limit is not None)
        return _examples(records, None, str(spec), limit, columns or {}, skip_bad)
    records, sizes = _named(source, path, split, streaming=limit is not None)
    loaded = _examples(records, source, str(spec), None if sizes else limit, columns or {}, skip_bad)
    return replace(loaded, examples=carve(loaded.examples, sizes, split)[:limit]) if sizes else loaded


def _examples(
    records: Records, source: Source | None, spec: str, limit: int | None, columns: Mapping[str, str], skip_bad: bool
) -> Loaded:
    """The examples of records, in their order; ids that repeat are bad rows too."""
    task = source.name if source else Path(spec).name.removesuffix(".gz").removesuffix(ending(spec) or "")
    found: dict[str, Example] = {}
    bad: list[str] = []
    number = 0
    for place, record in records:
        if limit is not None and len(found) >= limit:
            break
        try:
            for row in _rows(rename(record, columns), source):
                example = example_of(row, number=number, task=task)
                number += 1
                if example.id in found:
                    raise MoELensError(f"the ids of {spec} must be unique; these repeat: {example.id}")
                found[example.id] = example
        except MoELensError as error:
            number += 1
            bad.append(f"{place}: {error}")
            if not skip_bad:
                raise MoELensError(bad[0]) from None
    if not found:
        none = f"{spec} is empty" if not bad else f"none of the {number} rows of {spec} makes an example: {bad[0]}"
        raise MoELensError(f"{none}; expected rows with context, question and answer")
    return Loaded(list(islice(found.values(), limit)), number, tuple(bad))


def _rows(record: object, source: Source | None) -> Iterator[object]:
    """The rows of a record: itself where it has the plain columns, else what its data set makes of it."""
    if isinstance(record, MoELensError):
        raise record
    if source is None or not isinstance(record, Mapping) or all(isinstance(record.get(f), str) for f in PLAIN):
        yield record
        return
    try:
        yield from source.rows(record)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        if isinstance(error, MoELensError):
            raise
        shown = ", ".join(map(str, record)) or "nothing"
        raise MoELensError(f"not a record of {source.name} ({type(error).__name__}: {error}); it has {shown}") from None


def _named(source: Source, path: str, split: str, *, streaming: bool) -> tuple[Records, Mapping[str, int] | None]:
    """The records that hold a split of a named data set, and the sizes of the parts it is cut into, if it is."""
    home = source.home(split)
    sizes = source.carved.get(home)
    if path and not Path(path).is_dir():
        return source.read(Path(path)), None
    if path:
        own = [f"{split}{end}{zipped}" for end in ENDINGS for zipped in ("", ".gz")]
        published = source.files.get(home, ())
        for file in [*own, *published]:
            if Path(path, file).is_file():
                return source.read(Path(path, file)), sizes if file in published else None
        raise MoELensError(f"{path} has none of {', '.join([*published, *own])}")
    if source.hub is None:
        raise MoELensError(f"{source.name} is not on the hub in a form that can be pinned; give {source.name}:PATH")
    if home not in source.hub.splits:
        known = [*source.hub.splits, *(part for parts in source.carved.values() for part in parts)]
        raise MoELensError(f"{source.name} has the splits {', '.join(known)}; got {split!r}")
    hub = source.hub
    records = _hub(hub.id, hub.splits[home], hub.config, hub.revision, streaming=streaming and not sizes)
    return ((place, record) for place, record in records if hub.keep(record)), sizes


def _unnamed(spec: str, split: str, *, streaming: bool) -> Records:
    """The records of a task of the organism, of a file, or of whatever `datasets` loads."""
    if spec in ORGANISM_TASKS:
        return read_rows(Path(str(files("moe_lens") / "organism" / "tasks" / spec / f"{split}.json")))
    if ending(spec) is not None:
        return read_rows(spec)
    name, _, revision = spec.partition("@")
    if Path(name).is_dir():
        return _hub(name, split, None, None, streaming=False)
    owner, _, rest = name.partition("/")
    rest, _, config = rest.partition("/")
    return _hub(f"{owner}/{rest}" if rest else owner, split, config or None, revision or None, streaming=streaming)


def _hub(name: str, split: str, config: str | None, revision: str | None, *, streaming: bool) -> Records:
    import datasets  # takes seconds to import, and only hub data sets need it

    try:
        table = datasets.load_dataset(name, config, split=split, revision=revision, streaming=streaming)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise MoELensError(
            f"{name!r} is no task ({', '.join(ORGANISM_TASKS)}), no named data set ({', '.join(SOURCES)}), no .json or "
            f".jsonl file, and no data set that could be loaded with split {split!r}: {error}"
        ) from error
    return ((f"{name}, row {number}", row) for number, row in enumerate(table, start=1))
