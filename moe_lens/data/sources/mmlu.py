"""MMLU (Hendrycks et al., 2021): exam questions with four options."""

from collections.abc import Iterator
from pathlib import Path

from moe_lens.data.dataset import Hub, Record, Row, Source
from moe_lens.data.files import Records, csv_rows, ending, read_rows
from moe_lens.errors import MoELensError

LETTERS = "ABCD"


def rows(record: Record) -> Iterator[Row]:
    """The row of a record: the options are not shown in the question; each is scored as a continuation of it."""
    options = record["choices"] if "choices" in record else [record[letter] for letter in LETTERS]
    right = record["answer"]
    right = LETTERS.find(right) if isinstance(right, str) and len(right) == 1 else right
    if not isinstance(right, int) or not 0 <= right < len(options):
        raise MoELensError(f"expected the right option's number or its letter; got {record['answer']!r}")
    yield {"context": "", "question": record["question"], "answer": options[right], "options": options}


def read(path: Path) -> Records:
    """The records of a file; the authors' CSV files do not name their columns."""
    if ending(path) != ".csv":
        return read_rows(path)
    return csv_rows(path, delimiter=",", columns=["question", *LETTERS, "answer"])


SOURCE = Source(
    name="mmlu",
    rows=rows,
    hub=Hub(
        id="cais/mmlu",
        revision="c30699e8356da336a370243923dbaf21066bb9fe",
        config="all",
        splits={"train": "auxiliary_train", "dev": "validation", "test": "test"},
    ),
    read=read,
)
"""All subjects, in the hub's splits; the paper reports MMLU's test set (Table 4)."""
