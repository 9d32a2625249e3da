"""The MRQA 2019 form (Fisch et al.), in which the paper uses Natural Questions, SQuAD and HotpotQA."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from moe_lens.data.dataset import Hub, Record, Row, Source, unique


def rows(record: Record) -> Iterator[Row]:
    """One row per question of an MRQA record, or of the hub's flat record; the first line's header has none.

    The answers as annotated come first and then the ways they are written in the context, which may differ in case.
    """
    if "header" in record:
        return
    for asked in record.get("qas", [record]):
        yield {
            "id": asked["qid"],
            "context": record["context"],
            "question": asked["question"],
            "answer": unique([*asked["answers"], *_as_written(asked.get("detected_answers") or [], record["context"])]),
        }


def source(
    name: str,
    subset: str,
    *,
    dev: int,
    rows: Callable[[Record], Iterable[Row]] = rows,
    train_file: str | None = None,
    test_file: str | None = None,
) -> Source:
    """A data set that the paper uses as a subset of MRQA, whose dev set is the test set.

    dev: examples that are cut out of the training questions. rows: of a record, where it may have other forms too.
    train_file, test_file: the data set's own file of a split, looked for before that of MRQA.
    """
    own = {"train": train_file, "test": test_file}
    published = {"train": f"train/{subset}.jsonl.gz", "test": f"dev/{subset}.jsonl.gz"}
    return Source(
        name=name,
        rows=rows,
        hub=Hub(
            id="mrqa-workshop/mrqa",
            revision="f3178d9888471dfb2b67c93de14f0ddf499a8d9f",
            splits={"train": "train", "test": "validation"},
            keep=lambda record: record["subset"] == subset,
        ),
        files={split: tuple(file for file in (own[split], published[split]) if file) for split in own},
        carved={"train": {"dev": dev}},
    )


def _as_written(detected: dict[str, Any] | list[dict[str, Any]], context: str) -> Iterator[str]:
    """The answers' texts in the context; character spans there include their last character."""
    found = detected["char_spans"] if isinstance(detected, dict) else [answer["char_spans"] for answer in detected]
    for spans in found:
        if isinstance(spans, dict):  # the hub's form: a list of starts and one of ends
            spans = zip(spans["start"], spans["end"], strict=True)
        for start, end in spans:
            if written := context[start : end + 1].strip():
                yield written


NQ = source("nq", "NaturalQuestionsShort", dev=5204)
"""Table 6's 98,867 + 5,204 are MRQA's 104,071 training questions, its 12,836 test questions MRQA's dev set: the test
set is the paper's; dev is a part of the same size drawn by us; the authors' own are published files."""
