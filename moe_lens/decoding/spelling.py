"""Decodings as one word of a command says them: `cad:1`."""

from collections.abc import Callable

from moe_lens.decoding.context_aware import CAD, AdaCAD
from moe_lens.decoding.plain import PLAIN, Decoding
from moe_lens.decoding.pruning import Cited
from moe_lens.errors import MoELensError

NUMBERED: dict[str, tuple[Callable[..., Decoding], Callable[[str], float]]] = {
    "cad": (CAD, float),
    "adacad": (AdaCAD, float),
    "cite": (Cited, int),
}
"""Those with a number, by name, and how it is read; without it they take their own default."""


def parse_decoding(text: str) -> Decoding:
    """The decoding that a text names: plain, cad:ALPHA, adacad, adacad:PLUS, cite:K; MoELensError for others."""
    name, colon, number = text.strip().partition(":")
    if text.strip() == str(PLAIN):
        return PLAIN
    made, read = NUMBERED.get(name, (None, float))
    try:
        numbers = [read(number)] if colon else []
    except ValueError:
        numbers = None
    if made is None or numbers is None:
        raise MoELensError(
            f"the decoding must be {PLAIN}, or one of {', '.join(NUMBERED)}, with a number such as cad:1; got {text!r}"
        )
    return made(*numbers)
