"""Saved interventions as an option names them: a folder, or a folder of several, as they are or at other strengths."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_lens.commands import console
from moe_lens.errors import MoELensError
from moe_lens.lens.interventions import Intervention, load_intervention
from moe_lens.lens.interventions.stored import FACTS_FILE, TENSORS_FILE
from moe_lens.storage import is_there


@dataclass(frozen=True)
class Saved:
    """A saved intervention.

    of: the folder that was named, of whose interventions it may be one of several. strength: how many times as strong
    it is as it was saved; None where that was not asked for.
    """

    intervention: Intervention
    of: str
    strength: float | None = None


def read_saved(texts: Sequence[str]) -> dict[str, Saved]:
    """The interventions that FOLDER, or FOLDER:1,2 with strengths, name, by what tables call them: mine, mine@2.

    Of a folder with folders of saved interventions in it all are meant, as mine/layer-3@2.
    Raises MoELensError for what is none, has no strength, and where two have one name.
    """
    found: dict[str, Saved] = {}
    for text in texts:
        folder, strengths = _parted(text)
        of = folder.resolve().name
        for name, path in _each(folder, of).items():
            own = load_intervention(path)
            for strength in strengths:
                told = name if strength is None else f"{name}@{strength:.15g}"
                if told in found:
                    raise MoELensError(f"saved interventions are told by their folders' names, which repeat: {told}")
                found[told] = Saved(own if strength is None else own.scaled(strength), of, strength)
    return found


def _parted(text: str) -> tuple[Path, list[float | None]]:
    """A folder, and the strengths after the last colon; a path that is there is one, whatever is in it."""
    before, colon, after = text.rpartition(":")
    if not colon or is_there(text) or not is_there(before):
        return Path(text), [None]
    strengths = console.numbers(after, float, what=f"the strengths of --intervention {before}")
    if not all(map(math.isfinite, strengths)) or len(set(strengths)) < len(strengths):
        raise MoELensError(f"--intervention takes different finite strengths, such as {before}:1,2; got {text!r}")
    return Path(before), [*strengths]


def _each(folder: Path, name: str) -> dict[str, Path]:
    """The folder by its name, or, where it is none of an intervention, those in it that are."""
    if not is_there(folder):  # also of a name that can be none
        return {name: folder}
    # by either file, so that one that lost the other is refused and not passed over
    files = sorted(path for file in (FACTS_FILE, TENSORS_FILE) for path in folder.glob(f"*/{file}"))
    inner = {path.parent.name: path.parent for path in files}
    if (folder / FACTS_FILE).exists() or not inner:
        return {name: folder}
    return {f"{name}/{own}": path for own, path in inner.items()}
