"""SQuAD (Rajpurkar et al., 2016): the official file, the hub's rows, or the MRQA form, which is the paper's."""

from collections.abc import Iterator

from moe_lens.data.dataset import Record, Row, first_of, unique
from moe_lens.data.sources import mrqa


def rows(record: Record) -> Iterator[Row]:
    """One row per question of an article, of the hub's flat record or of an MRQA record."""
    if "paragraphs" in record:
        for paragraph in record["paragraphs"]:
            for asked in paragraph["qas"]:
                texts = [answer["text"] for answer in asked["answers"]]
                yield _row(asked["id"], paragraph["context"], asked["question"], texts)
    elif isinstance(record.get("answers"), dict):
        yield _row(record["id"], record["context"], first_of(record, "question"), record["answers"]["text"])
    else:
        yield from mrqa.rows(record)


def _row(name: str, context: str, question: str, answers: list[str]) -> Row:
    return {"id": name, "context": context, "question": question, "answer": unique(answers)}


SOURCE = mrqa.source("squad", "SQuAD", dev=4330, rows=rows, train_file="train-v1.1.json", test_file="dev-v1.1.json")
"""Table 6's 82,258 + 4,330 are MRQA's 86,588 training questions and its 10,507 test questions MRQA's dev set: the
test set is the paper's, and dev is a part of the same size drawn by us; the authors' own are published files."""
