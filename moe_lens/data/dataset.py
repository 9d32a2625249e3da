"""Source: a data set that has a name, where it is kept, and how its records become examples."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_lens.data.example import Example
from moe_lens.data.files import Records, read_rows
from moe_lens.errors import MoELensError

Record = Mapping[str, Any]
"""One record of a data set in its original format, which may be nested."""
Row = dict[str, object]
"""What an example is made of: `context` and `question` (or `verbatim`), `answer` (a text or a list of them), and, where
they are known, `id`, `original_answer` (the same), `options` and `group`."""


@dataclass(frozen=True)
class Hub:
    """A data set of the Hugging Face hub at one revision.

    splits: the hub's split that holds each of ours.
    keep: which of the hub's records belong to the data set.
    shots: the hub's split whose records are shown, answered, before those of their `subject`; each record of the other
        splits has those of its own as `shots`. None for a data set that shows none.
    """

    id: str
    revision: str
    splits: Mapping[str, str]
    config: str | None = None
    keep: Callable[[Record], bool] = lambda record: True
    shots: str | None = None


@dataclass(frozen=True)
class Source:
    """A named data set.

    rows: the rows of one record in the original format.
    hub: where it is on the hub; None if it is not there in a form that can be pinned.
    files: for each split the names that its file, or its folder of files, has where the authors publish it; the first
        that exists counts.
    carved: parts cut out of one split, by their sizes; what is left over stays under the split's own name.
    read: the records of a file, each with its place.
    says_memory: whether its records have what memory says.
    """

    name: str
    rows: Callable[[Record], Iterable[Row]]
    hub: Hub | None = None
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    carved: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    read: Callable[[Path], Records] = read_rows
    says_memory: bool = False

    def home(self, split: str) -> str:
        """The split that `split` is cut out of; itself for one that is stored as it is."""
        return next((home for home, parts in self.carved.items() if split in parts), split)


def carve(examples: list[Example], sizes: Mapping[str, int], split: str) -> list[Example]:
    """The part of a split that is called `split`, in its given order: parts are drawn by the hash of the id.

    The draw depends on nothing but the ids, so it is the same everywhere. Raises MoELensError if the parts together
    are larger than the whole.
    """
    if sum(sizes.values()) > len(examples):
        raise MoELensError(f"{len(examples)} examples are too few to cut {dict(sizes)} out of")
    drawn = sorted(range(len(examples)), key=lambda place: hashlib.sha256(examples[place].id.encode()).digest())
    start = 0
    for name, size in sizes.items():
        if name == split:
            return [examples[place] for place in sorted(drawn[start : start + size])]
        start += size
    return [examples[place] for place in sorted(drawn[start:])]


def first_of(record: Record, *names: str) -> Any:
    """The first of these fields that the record has.

    Raises MoELensError if it has none.
    """
    for name in names:
        if record.get(name) is not None:
            return record[name]
    raise MoELensError(f"expected {' or '.join(names)}; it has {', '.join(map(str, record)) or 'nothing'}")


def unique(texts: Iterable[object]) -> list[object]:
    """The texts in their order, each once, without space around them."""
    return list(dict.fromkeys(text.strip() if isinstance(text, str) else text for text in texts))
