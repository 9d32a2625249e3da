"""Batches of prompts of similar length, in bounded memory."""

from collections.abc import Iterable, Iterator
from itertools import islice

from moe_lens.data import Encoded
from moe_lens.errors import MoELensError

BATCHES_PER_WINDOW = 64


def batches(prompts: Iterable[Encoded], batch_size: int) -> Iterator[tuple[tuple[int, ...], list[Encoded]]]:
    """Prompts as batches, each with the prompts' places in the input.

    Reads `BATCHES_PER_WINDOW` batches ahead and gives these from the longest prompts to the shortest (equally
    long ones in their given order), so a batch has few pads and memory does not grow with the data set.
    Raises MoELensError for a batch size below 1.
    """
    if batch_size < 1:
        raise MoELensError(f"a batch has at least 1 example; got batch_size={batch_size}")
    numbered = enumerate(prompts)
    while window := list(islice(numbered, batch_size * BATCHES_PER_WINDOW)):
        window.sort(key=lambda item: (-len(item[1].input_ids), item[0]))
        for start in range(0, len(window), batch_size):
            places, chosen = zip(*window[start : start + batch_size], strict=True)
            yield places, list(chosen)
