"""MemoTrap (Liu and Liu, 2023): an instruction to end a saying in an unusual way, with two endings to choose from."""

import ast
from collections.abc import Iterator

from moe_lens.data.dataset import Hub, Record, Row, Source
from moe_lens.errors import MoELensError


def rows(record: Record) -> Iterator[Row]:
    """The row of a record: no context; the other ending is what memory says.

    `classes` is a list, or one written out as in Python.
    """
    options = [option.strip() for option in _listed(record["classes"])]
    right = int(record["answer_index"])
    if len(options) != 2 or right not in (0, 1):
        raise MoELensError(f"expected two classes and the index of one of them; got {options!r} and {right}")
    yield {
        "context": "",
        "question": record["prompt"],
        "answer": options[right],
        "original_answer": options[1 - right],
        "options": options,
    }


def _listed(classes: object) -> list[str]:
    try:
        listed = ast.literal_eval(classes) if isinstance(classes, str) else classes
    except (ValueError, SyntaxError):
        listed = None
    if not isinstance(listed, list) or not all(isinstance(option, str) for option in listed):
        raise MoELensError(f"classes must be a list of texts; got {classes!r:.80}")
    return listed


SOURCE = Source(
    name="memotrap",
    rows=rows,
    hub=Hub(
        id="pminervini/inverse-scaling",
        revision="581530528385df8eabd4a2991897b0743c5925d0",
        config="memo-trap",
        splits={"train": "data"},
    ),
    files={"train": ("1-proverb-ending.csv",)},
    carved={"train": {"dev": 100, "test": 300}},
)
"""The paper does not say how it split MemoTrap (936 rows on the hub); the sizes of the parts are ours."""
