"""Decodings as one word of a command says them: `cad:1`."""

from collections.abc import Callable

from moe_lens.decoding.context_aware import CAD, AdaCAD
from moe_lens.decoding.plain import PLAIN, Decoding
from moe_lens.errors import MoELensError

NUMBERED: dict[str, Callable[..., Decoding]] = {"cad": CAD, "adacad": AdaCAD}
"""Those with a number, by name; without it they take their own default."""


def parse_decoding(text: str) -> Decoding:
    """The decoding that a text names: plain, cad:ALPHA, adacad or adacad:PLUS; MoELensError for anything else."""
    name, colon, number = text.strip().partition(":")
    if text.strip() == str(PLAIN):
        return PLAIN
    try:
        numbers = [float(number)] if colon else []
    except ValueError:
        numbers = None
    if name not in NUMBERED or numbers is None:
        raise MoELensError(
            f"the decoding must be {PLAIN}, or one of {', '.join(NUMBERED)}, with a number such as cad:1; got {text!r}"
        )
    return NUMBERED[name](*numbers)
