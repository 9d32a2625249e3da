"""The paper's own splits, as its authors publish them, with what memory says joined from the public data set."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from moe_lens.data.dataset import Source
from moe_lens.data.example import Example
from moe_lens.data.files import ENDINGS, Records, read_rows
from moe_lens.errors import MoELensError

NAME = "authors"
"""What stands in the place of a revision: nq-swap@authors:FOLDER."""
PUBLIC = "public"
"""What a public data set's file is called beside the splits, if not as it is published."""


def folder_of(source: Source, path: str) -> Path:
    """The folder with this data set's splits: `path`, or the one in it that has the data set's name."""
    own = Path(path, source.name)
    found = own if own.is_dir() else Path(path)
    if not path or not found.is_dir():
        raise MoELensError(f"{source.name}@{NAME}: takes the folder of its train, dev and test files; got {path!r}")
    return found


def public_file(source: Source, folder: Path) -> Path | None:
    """The public data set's file beside the splits, None without one."""
    published = [name for names in source.files.values() for name in names]
    names = [*published, *(f"{PUBLIC}{end}{zipped}" for end in ENDINGS for zipped in ("", ".gz"))]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def split_rows(folder: Path, source: Source, split: str) -> Records:
    """The rows of a split's file; MoELensError where there is none."""
    file = folder / f"{split}.json"
    if not file.is_file():
        raise MoELensError(f"{folder} has no {file.name}, the authors' file of the split {split!r} of {source.name}")
    return read_rows(file)


def with_memory(examples: Iterable[Example], public: Iterable[Example]) -> list[Example]:
    """The examples with what memory says, by their question: all names that the public examples with it have.

    Those that also share the context count alone, where there are any. What no public example asks stays unknown.
    """
    of_question: dict[str, list[Example]] = {}
    for one in public:
        of_question.setdefault(_joined(one.question), []).append(one)
    found = []
    for example in examples:
        others = of_question.get(_joined(example.question), [])
        same = [one for one in others if _joined(one.context) == _joined(example.context)]
        names = list(dict.fromkeys(name for one in same or others for name in one.memory))
        if names:
            example = replace(example, original_answer=names[0], original_aliases=tuple(names[1:]))
        found.append(example)
    return found


def _joined(text: str) -> str:
    """A text by which rows of two files are told to be of one: in lower case, with single spaces."""
    return " ".join(text.lower().split())
