"""MMLU (Hendrycks et al., 2021): exam questions with four options, in the usual form and by the options' texts."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from moe_lens.data.dataset import Hub, Record, Row, Source
from moe_lens.data.files import Records, csv_rows, ending, read_rows
from moe_lens.errors import MoELensError

LETTERS = "ABCD"
SHOWN = 5
REVISION = "c30699e8356da336a370243923dbaf21066bb9fe"


def rows(record: Record) -> Iterator[Row]:
    """The row of a record in the usual form: what is chosen between are the letters.

    Before the question stand the first five of its subject's dev questions with their answers, each with its options,
    as the authors print them; "about" is followed by one space, not two. `shots`: the records of these.
    """
    _, right = _options(record)
    subject, shots = record["subject"], record.get("shots", ())
    if len(shots) < SHOWN:
        raise MoELensError(
            f"the usual form shows {SHOWN} answered dev questions of the subject {subject!r}, and {len(shots)} are at "
            "hand; give the folder that has dev, val and test, or take mmlu-text, which shows none"
        )
    head = f"The following are multiple choice questions (with answers) about {str(subject).replace('_', ' ')}."
    shown = [f"{_asked(shot)} {LETTERS[_options(shot)[1]]}" for shot in shots[:SHOWN]]
    text = "\n\n".join([head, *shown, _asked(record)])
    yield {"verbatim": text, "answer": LETTERS[right], "options": list(LETTERS), "group": subject}


def text_rows(record: Record) -> Iterator[Row]:
    """The row of a record without its options in the question: each of their texts is scored as a continuation."""
    options, right = _options(record)
    yield {
        "context": "",
        "question": record["question"],
        "answer": options[right],
        "options": options,
        "group": record.get("subject"),
    }


def read(path: Path) -> Records:
    """The records of a file or of all files of a split's folder; the authors' CSV files do not name their columns.

    Each says its subject, and has the dev questions of it beside, where the authors' folders say so
    (test/anatomy_test.csv, dev/anatomy_dev.csv).
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if ending(file) == ".csv")
        if not files:
            raise MoELensError(f"{path} has no .csv files, one for each subject")
        return (record for file in files for record in read(file))
    if ending(path) != ".csv":
        return read_rows(path)
    subject = path.name.removesuffix(".gz").removesuffix(".csv").removesuffix(f"_{path.parent.name}")
    dev = path.parent.parent / "dev" / f"{subject}_dev.csv"
    shots = [row for _, row in _csv(dev)] if dev.is_file() else []
    named = {"subject": subject, "shots": shots}
    return ((place, {**row, **named} if isinstance(row, Mapping) else row) for place, row in _csv(path))


def _csv(path: Path) -> Records:
    return csv_rows(path, delimiter=",", columns=["question", *LETTERS, "answer"])


def _options(record: Record) -> tuple[Sequence[str], int]:
    """The four options, and the place of the right one, which is given as its number or as its letter."""
    options = record["choices"] if "choices" in record else [record[letter] for letter in LETTERS]
    right = record["answer"]
    right = LETTERS.find(right) if isinstance(right, str) and len(right) == 1 else right
    if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < len(options):
        raise MoELensError(f"expected the right option's number or its letter; got {record['answer']!r}")
    return options, right


def _asked(record: Record) -> str:
    """A question with its options by letter, up to where the answer stands."""
    options, _ = _options(record)
    if not record["question"].strip():
        raise MoELensError("a record has a blank question; give it one or leave it out")
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True)]
    return "\n".join([record["question"].strip(), *lines, "Answer:"])


SOURCE = Source(
    name="mmlu",
    rows=rows,
    hub=Hub(
        id="cais/mmlu",
        revision=REVISION,
        config="all",
        splits={"dev": "validation", "test": "test"},
        shots="dev",
    ),
    files={"dev": ("val",), "test": ("test",)},
    read=read,
)
"""All subjects in the usual form; the paper reports MMLU's test set (Table 4). Its auxiliary training set has none."""

TEXT = Source(
    name="mmlu-text",
    rows=text_rows,
    hub=Hub(
        id="cais/mmlu",
        revision=REVISION,
        config="all",
        splits={"train": "auxiliary_train", "dev": "validation", "test": "test"},
    ),
    files=SOURCE.files,
    read=read,
)
"""The same questions, in which what is chosen between are the options' texts, unseen."""
