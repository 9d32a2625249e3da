"""From a row of named columns to an example, with its place in every error."""

from collections.abc import Mapping
from typing import Any

from moe_lens.data.example import Asked, Example
from moe_lens.errors import MoELensError

FIELDS = ("id", "context", "question", "prompt", "verbatim", "answer", "original_answer", "options", "group")
"""The columns of a row; it has `context` and `question`, or one of `ASKED_ALONE`. `id`, `original_answer`, `options`
and `group` may be missing or, as a CSV must have it, empty."""
ASKED_ALONE: tuple[Asked, ...] = ("prompt", "verbatim")
"""The columns that stand for context and question together."""


def parse_columns(text: str) -> dict[str, str]:
    """The mapping of a --columns option such as "question=query,answer=gold.text".

    Raises MoELensError for anything else.
    """
    pairs = [part.partition("=") for part in text.split(",")]
    columns = {name.strip(): column.strip() for name, _, column in pairs}
    if not all(columns.values()):
        raise MoELensError(f"columns are named as field=column,field=column; got {text!r}")
    return columns


def check_columns(columns: Mapping[str, str]) -> None:
    """MoELensError unless only fields of a row are renamed."""
    unknown = sorted(set(columns) - set(FIELDS))
    if unknown:
        raise MoELensError(f"columns can rename {', '.join(FIELDS)}; got {', '.join(unknown)}")


def rename(record: object, columns: Mapping[str, str]) -> object:
    """The record with its fields found under other names; a dot leads into a nested object.

    Where a prompt is named, what the record calls context and question is none of it.
    Raises MoELensError for a column that the record lacks.
    """
    if not columns or not isinstance(record, Mapping):
        return record
    alone = not columns.keys().isdisjoint(ASKED_ALONE)
    named = {field: _nested(record, column) for field, column in columns.items()}
    kept = {name: value for name, value in record.items() if not alone or name not in ("context", "question")}
    return {**kept, **named}


def has(record: object, column: str, value: str) -> bool:
    """Whether a record has this value in a column; a dot leads into a nested object.

    Raises MoELensError for a column that the record lacks.
    """
    return isinstance(record, Mapping) and str(_nested(record, column)) == value


def example_of(row: object, *, number: int, task: str) -> Example:
    """The example of one row; its number is its id where it has none or an empty one.

    Raises MoELensError if a field is missing or of a wrong kind.
    """
    if not isinstance(row, Mapping):
        raise MoELensError(f"expected an object with context, question, answer; got {row!r:.80}")
    asked, context, question = _asked(row)
    if not isinstance(row.get("id"), str | int | float | None):
        raise MoELensError(f"an id must be text or a number; got {row['id']!r:.80}")
    answers = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
    options = row.get("options") or []
    known = "" if row.get("original_answer") is None else row["original_answer"]
    memory = [known] if isinstance(known, str) else known
    lists = all(isinstance(texts, list | tuple) for texts in (answers, options, memory))
    if not lists or not all(isinstance(text, str) for text in [context, question, *answers, *options, *memory]):
        raise MoELensError(
            "context, question and answer must be text, and so must a prompt (answer, original_answer and options: or "
            "a list of texts)"
        )
    names = list(dict.fromkeys(name.strip() for name in memory if name.strip()))
    return Example(
        id=str(number if row.get("id") in (None, "") else row["id"]),
        context=context,
        question=question,
        answers=tuple(answer.strip() for answer in answers),
        original_answer=names[0] if names else None,
        original_aliases=tuple(names[1:]),
        task=task,
        options=tuple(option.strip() for option in options),
        asked=asked,
        group="" if row.get("group") is None else str(row["group"]),
    )


def _asked(row: Mapping[str, Any]) -> tuple[Asked, Any, Any]:
    """How a row is asked, its context and its question; MoELensError where these or the answer are missing."""
    whole = row.get("context") is not None and row.get("question") not in (None, "")
    alone = next((kind for kind in ASKED_ALONE if not whole and row.get(kind) not in (None, "")), None)
    needed = ["context", "question"] if alone is None else [alone]
    missing = [field for field in [*needed, "answer"] if row.get(field) is None]
    if missing:
        raise MoELensError(
            f"{', '.join(missing)} missing; it has {', '.join(map(str, row)) or 'nothing'}; name its columns as "
            "question=q,…; a closed-book question has the context '', and a prompt or verbatim stands for both"
        )
    return ("question", row["context"], row["question"]) if alone is None else (alone, "", row[alone])


def _nested(record: Mapping[str, object], column: str) -> object:
    if column in record:
        return record[column]
    value: object = record
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise MoELensError(f"no column {column!r}; it has {', '.join(map(str, record)) or 'nothing'}")
        value = value[part]
    return value
