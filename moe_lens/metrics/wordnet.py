"""WordNet where the user has it: in nltk's data, or as the files that Princeton and Debian give out."""

import io
import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from moe_lens.errors import MoELensError
from moe_lens.extras import optional

DEBIAN = "/usr/share/wordnet"
"""Where Debian's and Ubuntu's package wordnet-base puts the files."""
LEXICOGRAPHER_FILES = 45


@cache
def wordnet() -> Any:
    """An nltk WordNet reader: of nltk's corpus if there is one, else of plain files.

    Those are looked for where WordNet's own programs look ($WNSEARCHDIR, $WNHOME/dict), then where Debian puts them.
    Raises MoELensError that says how to get WordNet if it is in none of these places.
    """
    corpus = optional("nltk", extra="text").corpus.wordnet
    try:
        corpus.ensure_loaded()
        return corpus
    except LookupError:
        pass  # nltk has no copy
    places = [os.environ.get("WNSEARCHDIR"), _below(os.environ.get("WNHOME"), "dict"), DEBIAN]
    for folder in (Path(place) for place in places if place):
        if (folder / "data.noun").is_file():
            return read_wordnet(folder)
    raise MoELensError(
        "METEOR needs WordNet, and there is none in nltk's data, $WNSEARCHDIR, $WNHOME/dict or "
        f"{DEBIAN}; get it with `python -m nltk.downloader wordnet` or `apt install wordnet-base`"
    )


def read_wordnet(folder: Path) -> Any:
    """nltk's reader on a folder of WordNet's own files.

    nltk opens only what is below its data path, so the folder is put on it. It also wants the list of the 45
    lexicographer files, which not everyone gives out; where it is missing they are called by their numbers, which
    changes no relation between words.
    """

    reader: Any = optional("nltk.corpus.reader.wordnet", extra="text").WordNetCorpusReader

    class PlainFiles(reader):
        def open(self, file: str) -> Any:
            if file == "lexnames" and not (folder / file).exists():
                return io.StringIO("".join(f"{i:02} file-{i:02} 0\n" for i in range(LEXICOGRAPHER_FILES)))
            return super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            """Of other languages' senses, of which plain files have none."""

    paths = optional("nltk.data", extra="text").path
    if str(folder) not in paths:
        paths.append(str(folder))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The multilingual functions are not available")
        return PlainFiles(str(folder), None)


def _below(folder: str | None, name: str) -> str | None:
    return None if folder is None else str(Path(folder) / name)
