"""Loading examples: the organism's tasks by name, JSON and JSON-lines files, and data sets of the hub."""

import json
from collections import Counter
from collections.abc import Iterable
from importlib.resources import files
from itertools import islice
from pathlib import Path

from moe_lens.data.example import Example
from moe_lens.errors import MoELensError

ORGANISM_TASKS = ("swap", "novel", "consistent", "hops", "closed_book", "summary")


def load_examples(spec: str | Path, *, split: str = "test", limit: int | None = None) -> list[Example]:
    """The first `limit` examples (all by default) of a task, a file or a data set.

    spec: a task of the organism ("swap", …); a .json file (a list of objects) or .jsonl file (an object per
        line); anything else is a data set of the Hugging Face hub, or a folder that `datasets` can read.
    split: of a task or data set; a file has none.

    Each row has `context` ("" for closed-book), `question` and `answer` (a string or a list of them), and may
    have `id` (else its number) and `original_answer`. Raises MoELensError for anything else, naming the row.
    """
    if limit is not None and limit < 1:
        raise MoELensError(f"limit is a number of examples, at least 1; got {limit}")
    name = str(spec)
    if name in ORGANISM_TASKS:
        rows = _json_rows(Path(str(files("moe_lens") / "organism" / "tasks" / name / f"{split}.json")))
    elif name.endswith(".json"):
        rows = _json_rows(Path(name))
    elif name.endswith(".jsonl"):
        rows = _json_lines(Path(name))
    else:
        rows = _hub_rows(name, split)
    task = Path(name).stem
    examples = [_example(row, number, place, task) for number, (place, row) in enumerate(islice(rows, limit))]
    if not examples:
        raise MoELensError(f"{name} is empty; expected rows with context, question and answer")
    repeated = [key for key, count in Counter(e.id for e in examples).items() if count > 1]
    if repeated:
        raise MoELensError(f"the ids of {name} must be unique; these repeat: {', '.join(repeated[:5])}")
    return examples


def _json_rows(path: Path) -> list[tuple[str, object]]:
    """The rows of a JSON list, each with the words that name its place."""
    try:
        rows = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise MoELensError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    if not isinstance(rows, list):
        raise MoELensError(f"{path}: expected a JSON list of objects; got {type(rows).__name__}")
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows, start=1)]


def _json_lines(path: Path) -> list[tuple[str, object]]:
    rows = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            try:
                rows.append((f"{path}, line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise MoELensError(f"{path}, line {number}: not JSON ({error.msg})") from None
    return rows


def _hub_rows(name: str, split: str) -> Iterable[tuple[str, object]]:
    import datasets  # takes seconds to import, and only hub data sets need it

    try:
        table = datasets.load_dataset(name, split=split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise MoELensError(
            f"{name!r} is no task ({', '.join(ORGANISM_TASKS)}), no .json or .jsonl file, and no data set "
            f"that could be loaded with split {split!r}: {error}"
        ) from error
    return ((f"{name}, row {number}", row) for number, row in enumerate(table, start=1))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise MoELensError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise MoELensError(f"{path} is not UTF-8 text: {error}") from None


def _example(row: object, number: int, place: str, task: str) -> Example:
    """The example of one row; MoELensError with the row's place if a field is missing or of a wrong kind."""
    if not isinstance(row, dict):
        raise MoELensError(f"{place}: expected an object with context, question, answer; got {row!r:.80}")
    missing = [field for field in ("context", "question", "answer") if row.get(field) is None]
    if missing:
        raise MoELensError(f"{place}: {', '.join(missing)} missing; it has {', '.join(row) or 'nothing'}")
    answers = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
    original = row.get("original_answer")
    texts = [row["context"], row["question"], "" if original is None else original]
    if not isinstance(answers, list) or not all(isinstance(text, str) for text in [*texts, *answers]):
        raise MoELensError(f"{place}: context, question and answer must be text (answer: or a list of texts)")
    try:
        return Example(
            id=str(number if row.get("id") is None else row["id"]),
            context=row["context"],
            question=row["question"],
            answers=tuple(answer.strip() for answer in answers),
            original_answer=original,
            task=task,
        )
    except MoELensError as error:
        raise MoELensError(f"{place}: {error}") from None
