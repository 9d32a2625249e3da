"""Gigaword headlines (Rush et al., 2015): a news sentence and its headline as a short summary."""

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from moe_lens.data.dataset import Record, Row, Source, first_of
from moe_lens.data.files import Records, ending, read_rows, text_lines
from moe_lens.errors import MoELensError

QUESTION = "What is a short summary of the context, as a headline?"
ARTICLES, HEADLINES = ".article", ".title"


def rows(record: Record) -> Iterator[Row]:
    """The row of a record with a document and its summary."""
    yield {
        "id": record.get("id"),
        "context": first_of(record, "document", "article"),
        "question": QUESTION,
        "answer": first_of(record, "summary", "title"),
    }


def read(path: Path) -> Records:
    """The records of a file, or of two text files with a line per record: train.article.txt and train.title.txt."""
    if ending(path) is not None or ARTICLES not in path.name:
        yield from read_rows(path)
        return
    headlines = path.with_name(path.name.replace(ARTICLES, HEADLINES))
    pairs = zip_longest(text_lines(path), text_lines(headlines))
    for number, (article, title) in enumerate(pairs, start=1):
        if article is None or title is None:
            more, fewer = (path, headlines) if title is None else (headlines, path)
            raise MoELensError(f"{more} has more lines than {fewer.name}, which ends before line {number}")
        yield f"{path}, line {number}", {"document": article.rstrip("\n"), "summary": title.rstrip("\n")}


SOURCE = Source(
    name="gigaword",
    rows=rows,
    files={
        "pool": ("train.article.txt", "train.article.txt.gz", "train.jsonl", "train.parquet"),
    },
    carved={"pool": {"train": 2000, "dev": 500, "test": 500}},
    read=read,
)
"""The hub's Gigaword needs a loading script, which `datasets` no longer runs, so files are needed. The paper samples
2,000, 500 and 500 examples; so do we, out of the training file, as its own draw is not published."""
