"""What the command that compares is given: how the first of two models or deltas is opened, or the one of traces."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from moe_lens.commands.options import BaseOpening, Opening
from moe_lens.errors import MoELensError
from moe_lens.lens.delta import FACTS_FILE, read_facts
from moe_lens.storage import is_there


def first_opened(opening: BaseOpening, first: str, second: str) -> Opening:
    """How the first of two is opened: a model by its name, a delta on its base, which the second shares if it is one.

    Raises MoELensError where the base is not known, and for a base that is given beside two models.
    """
    told = _told(opening)
    deltas = [folder for folder in (first, second) if is_there(Path(folder) / FACTS_FILE)]
    if opening.model and not deltas:
        raise MoELensError("--model is what a delta is put on, and neither of the two is one; leave it out")
    if first not in deltas:
        if opening.model and opening.model != first:
            raise MoELensError(f"{second} is compared on {first}; leave --model {opening.model} out")
        return Opening(**told | {"model": first})
    return Opening(**told | {"model": opening.model or _base(first), "delta": Path(first)})


def served(opening: BaseOpening) -> Opening:
    """How the model is opened whose traces are compared; MoELensError where none is named."""
    if not opening.model:
        raise MoELensError("traces are of a model; give it as --model")
    return Opening(**_told(opening))


def _told(opening: BaseOpening) -> dict[str, Any]:
    return {one.name: getattr(opening, one.name) for one in fields(opening)}


def _base(folder: str) -> str:
    """The model that a delta was trained from, by its own facts."""
    told = read_facts(folder).get("model")
    if not isinstance(told, str):
        raise MoELensError(f"the delta at {folder} does not say what it was trained from; give that as --model")
    return told
