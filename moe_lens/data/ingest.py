"""Loading examples from whatever a specification of data names, with a place for everything that is wrong."""

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from moe_lens.data.authors import with_memory
from moe_lens.data.dataset import Source, carve
from moe_lens.data.example import Example
from moe_lens.data.lookup import Found, find
from moe_lens.data.rows import check_columns, example_of, has, rename
from moe_lens.errors import MoELensError
from moe_lens.storage import is_there

PLAIN = (("context", "question", "answer"), ("prompt", "answer"), ("verbatim", "answer"))
PART = re.compile(r"(.*)\[([^][=]+)=([^][]*)\]", re.DOTALL)
"""How a part of data is written: the rows with this value in this column."""


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
                       memotrap, mmlu, mmlu-text
        NAME:PATH      the same (also confiqa-qa, confiqa-mr, confiqa-mc, gigaword) from a file in its original format,
                       or from a folder that has the file of each split, by its original name or as SPLIT.json, …
        PATH           a .json, .jsonl, .csv, .tsv or .parquet file of rows (the text ones also gzipped)
        NAME@REVISION  a data set at another revision of the hub
        NAME@authors:FOLDER  the splits that the paper's authors publish, with what memory says joined by question from
                       the public data set (its file in the folder, else the hub)
        FOLDER         with a file of rows for each split, SPLIT.json, SPLIT.csv, …
        ID, ID@REVISION, ID/CONFIG@REVISION, FOLDER: whatever `datasets` can load
        …[COLUMN=VALUE] of any of these the rows that have this value in this column, such as answers.csv[label=refuses]
    split: of a task, data set or folder; a file has none and is taken whole.
    columns: the names that a row's fields have, such as {"question": "query", "answer": "gold.text"}.
    skip_bad: leave out rows that make no example, with a warning that counts them and quotes the first;
        `read_examples` gives them all.

    A row has `context` ("" for closed-book), `question`, `answer` (a text or a list of them) and may have `id` (else
    its number, from 0), `original_answer` (what memory says; a text or a list of its names), `options` and `group`;
    files of a named data set may have such rows too. In place of context and question it may have a `prompt`, the
    user's whole turn, or `verbatim`, the whole text that the model reads.
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
    part = None if is_there(spec) else PART.fullmatch(str(spec))
    found = find(part[1] if part else str(spec), split, streaming=limit is not None)
    if part:
        found = replace(found, records=(own for own in found.records if has(own[1], part[2], part[3])))
    loaded = _examples(found, str(spec), None if found.parts else limit, columns or {}, skip_bad)
    if found.public is not None:
        return replace(loaded, examples=_joined(loaded.examples, found.public(), str(spec), skip_bad))
    if not found.parts:
        return loaded
    return replace(loaded, examples=carve(loaded.examples, found.parts, split)[:limit])


def _joined(examples: list[Example], public: Found, spec: str, skip_bad: bool) -> list[Example]:
    """The examples with what memory says, of those that the public records ask too; a warning counts the others."""
    joined = with_memory(examples, _examples(public, f"the public {public.task}", None, {}, skip_bad).examples)
    unknown = sum(not example.memory for example in joined)
    if unknown == len(joined):
        raise MoELensError(f"none of the {unknown} questions of {spec} is in the public {public.task} beside them")
    if unknown:
        told = f"of {unknown} of {len(joined)} examples the public {public.task} does not tell what memory says"
        warnings.warn(f"{spec}: {told}", stacklevel=4)
    return joined


def _examples(source: Found, spec: str, limit: int | None, columns: Mapping[str, str], skip_bad: bool) -> Loaded:
    """The examples of records, in their order; ids that repeat are bad rows too."""
    found: dict[str, Example] = {}
    bad: list[str] = []
    rows = ((place, row) for place, record in source.records for row in _rows(record, columns, source.source))
    for place, row in rows:
        try:
            if isinstance(row, MoELensError):
                raise row
            example = example_of(row, number=len(found) + len(bad), task=source.task)
            if example.id in found:
                raise MoELensError(f"the ids of {spec} must be unique; these repeat: {example.id}")
            found[example.id] = example
        except MoELensError as error:
            bad.append(f"{place}: {error}")
            if not skip_bad:
                raise MoELensError(bad[0]) from None
        if len(found) == limit:
            break
    if not found:
        none = f"{spec} is empty" if not bad else f"none of the {len(bad)} rows of {spec} makes an example: {bad[0]}"
        raise MoELensError(f"{none}; expected rows with context, question and answer, or prompt and answer")
    return Loaded(list(found.values()), len(found) + len(bad), tuple(bad))


def _rows(record: object, columns: Mapping[str, str], source: Source | None) -> Iterator[object]:
    """The rows of a record: itself where it has the plain columns, else what its data set makes of it.

    An error stands for a row that could not be read, and for what would come after it in the record.
    """
    try:
        record = rename(record, columns)
    except MoELensError as error:
        yield error
        return
    if (
        source is None
        or not isinstance(record, Mapping)
        or any(all(isinstance(record.get(field), str) for field in fields) for fields in PLAIN)
    ):
        yield record
        return
    try:
        yield from source.rows(record)
    except MoELensError as error:
        yield error
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        shown = ", ".join(map(str, record)) or "nothing"
        yield MoELensError(f"not a record of {source.name} ({type(error).__name__}: {error}); it has {shown}")
