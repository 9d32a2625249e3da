"""What the command that compares is given: of two models or deltas, how the first is opened."""

from dataclasses import replace
from pathlib import Path

from moe_lens.commands.options import Opening
from moe_lens.errors import MoELensError
from moe_lens.lens.delta import FACTS_FILE, read_facts
from moe_lens.storage import is_there


def first_opened(opening: Opening, first: str, second: str) -> Opening:
    """How the first of two is opened: a model by its name, a delta on its base, which the second shares if it is one.

    Raises MoELensError where the base is not known, and for a base that is given beside two models.
    """
    if opening.delta is not None:
        raise MoELensError("the arguments name what is compared; give a delta as one of them, not as --delta")
    deltas = [folder for folder in (first, second) if is_there(Path(folder) / FACTS_FILE)]
    if opening.model and not deltas:
        raise MoELensError("--model is what a delta is put on, and neither of the two is one; leave it out")
    if first not in deltas:
        if opening.model and opening.model != first:
            raise MoELensError(f"{second} is compared on {first}; leave --model {opening.model} out")
        return replace(opening, model=first)
    return replace(opening, model=opening.model or _base(first), delta=Path(first))


def _base(folder: str) -> str:
    """The model that a delta was trained from, by its own facts."""
    told = read_facts(folder).get("model")
    if not isinstance(told, str):
        raise MoELensError(f"the delta at {folder} does not say what it was trained from; give that as --model")
    return told
