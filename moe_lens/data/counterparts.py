"""The other half of a pair for activation patching: an example's question, asked in another way."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from moe_lens.data.example import Example
from moe_lens.data.words import occurrences
from moe_lens.errors import MoELensError


def memory_said(example: Example) -> Example | None:
    """The example with a context that says what memory says, in every place of a gold answer.

    None where memory is unknown or the context does not hold an answer.
    """
    found = sorted(occurrences(example.answers, example.context), key=lambda place: (place.start, -place.stop))
    if not example.memory or not found:
        return None
    text, end = [], 0
    for place in found:
        if place.start >= end:  # an answer within another is in its place already
            text += [example.context[end : place.start], example.memory[0]]
            end = place.stop
    return replace(example, context="".join([*text, example.context[end:]]))


def without_context(example: Example) -> Example | None:
    """The example asked closed-book; None where it is so anyway."""
    return replace(example, context="") if example.context.strip() else None


COUNTERPARTS: Mapping[str, Callable[[Example], Example | None]] = {
    "memory": memory_said,
    "no_context": without_context,
}
"""How the other half of a pair is made from an example, by name."""


def counterparts_from(others: Iterable[Example], examples: Iterable[Example]) -> list[Example | None]:
    """Of each example the one of `others` with its id, scored by the example's own answers; None where there is none.

    Raises MoELensError where no ids are shared, and for others of one id.
    """
    by_id: dict[str, Example] = {}
    for other in others:
        if by_id.setdefault(other.id, other) is not other:
            raise MoELensError(
                f"examples are paired by id, and {other.id!r} stands for two; give each an id of its own"
            )
    found = [
        replace(example, context=by_id[example.id].context, question=by_id[example.id].question)
        if example.id in by_id
        else None
        for example in examples
    ]
    if not any(found):
        raise MoELensError("examples are paired by id, and none of these are shared; give both halves the same ids")
    return found
