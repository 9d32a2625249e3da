"""Offsets: which tokens of a tokenised text cover which of its characters, for fast and for slow tokenizers."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, groupby
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from moe_lens.errors import MoELensError

PROBE = "a"
"""A text by which it is seen what a tokenizer puts around one."""
BROKEN = "\ufffd"
"""What a decoder writes for the bytes of a character that has not come to its end."""


class Offsets:
    """The tokens of a text with the characters that each covers; some, such as special tokens, may cover none.

    offsets: per token a half-open range of characters.
    """

    def __init__(self, offsets: Sequence[tuple[int, int]]) -> None:
        self._places = [place for place, (start, stop) in enumerate(offsets) if start < stop]
        starts, stops = ([offsets[place][end] for place in self._places] for end in (0, 1))
        # Sorted whatever the tokenizer does: the highest stop so far, the lowest start from here on.
        self._stops = list(accumulate(stops, max))
        self._starts = list(accumulate(reversed(starts), min))[::-1]

    def tokens(self, characters: slice) -> slice | None:
        """From the first to the last token that covers some of these characters; None if none does."""
        first = bisect_right(self._stops, characters.start)
        stop = bisect_left(self._starts, characters.stop)
        return slice(self._places[first], self._places[stop - 1] + 1) if first < stop else None


class DecodedOffsets:
    """The same for a tokenizer that gives no offsets: found by decoding longer and longer beginnings of the text.

    leading: tokens before the text's own, such as begin-of-sequence.
    Raises MoELensError if the tokens do not decode to the text they came from, letter by letter.
    """

    def __init__(self, text: str, ids: list[int], leading: int, decode: Callable[[list[int]], str]) -> None:
        self._text, self._ids, self._leading, self._decode = text, ids, leading, decode
        self._length = cache(lambda n: _decoded_length(text, decode(ids[:n])))
        if self._length(len(ids)) != len(text):
            raise _not_exact()

    def tokens(self, characters: slice) -> slice | None:
        """From the first to the last token that covers some of these characters; None if there are none."""
        counts = range(len(self._ids) + 1)
        first = bisect_left(counts, characters.start, key=self._length)
        if self._length(first) > characters.start:  # a token that begins before these characters
            first -= 1
        stop = bisect_left(counts, characters.stop, key=self._length)
        if self._text[characters] not in self._decode(self._ids[first:stop]):
            raise _not_exact()
        return slice(self._leading + first, self._leading + stop) if first < stop else None


def tokenise(
    text: str, tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool
) -> tuple[list[int], Offsets | DecodedOffsets]:
    """The text's tokens and which of its characters they cover.

    Raises MoELensError for a slow tokenizer (one without offsets) that does not decode its tokens to the same text.
    """
    if tokenizer.is_fast:
        encoded = _encoded(text, tokenizer, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        leading = _leading(ids, tokenizer) if add_special_tokens else []
        offsets = _told_apart(text, ids, encoded["offset_mapping"], _decoder(tokenizer))
        return [*leading, *ids], Offsets([(0, 0)] * len(leading) + offsets)
    ids = _encoded(text, tokenizer, add_special_tokens=False)["input_ids"]
    leading = _leading(ids, tokenizer) if add_special_tokens else []
    return [*leading, *ids], DecodedOffsets(text, ids, len(leading), _decoder(tokenizer))


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool) -> list[int]:
    """The text's tokens, which something can be appended to: special tokens are added before it alone.

    What some tokenizers put after a text, such as end-of-sequence, is left out, and so is what they put before one that
    begins with it already.
    """
    ids: list[int] = _encoded(text, tokenizer, add_special_tokens=False)["input_ids"]
    return [*(_leading(ids, tokenizer) if add_special_tokens else []), *ids]


def _leading(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text; none where the text, of these `ids`, begins so."""
    own, whole = (_encoded(PROBE, tokenizer, add_special_tokens=added)["input_ids"] for added in (False, True))
    places = range(len(whole) - len(own) + 1)
    leading: list[int] = whole[: next((at for at in places if whole[at : at + len(own)] == own), 0)]
    return [] if ids[: len(leading)] == leading else leading


def _encoded(text: str, tokenizer: PreTrainedTokenizerBase, **options: bool) -> Any:
    """What the tokenizer makes of a text, in which the names of special tokens stand for these."""
    if getattr(tokenizer, "split_special_tokens", False):
        options["split_special_tokens"] = False
    return tokenizer(text, **options)


def _told_apart(
    text: str, ids: list[int], offsets: Sequence[tuple[int, int]], decode: Callable[[list[int]], str]
) -> list[tuple[int, int]]:
    """The offsets, with tokens that all claim the same several characters told apart by what they decode to.

    That is how unigram tokenizers give the bytes of characters they do not know.
    """
    told: list[tuple[int, int]] = []
    for (start, stop), run in groupby(offsets):
        size = len(list(run))
        run_ids = ids[len(told) : len(told) + size]
        if size == 1 or stop - start < 2 or decode(run_ids) != text[start:stop]:
            told += [(start, stop)] * size
            continue
        written = text[start:stop]
        # Some decoders break all bytes that came before a broken one; a character that was whole stays so.
        ends = list(accumulate((_decoded_length(written, decode(run_ids[:n])) for n in range(size + 1)), max))
        told += [(start + ends[n], start + next(end for end in ends[n + 1 :] if end > ends[n])) for n in range(size)]
    return told


def _decoded_length(text: str, decoded: str) -> int:
    """How many characters of the text are decoded in full; the rest of `decoded` may be a broken character."""
    while not text.startswith(decoded):
        if not decoded.endswith(BROKEN):
            raise _not_exact()
        decoded = decoded[: -len(BROKEN)]
    return len(decoded)


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    quiet = {"clean_up_tokenization_spaces": False}
    if not tokenizer.is_fast:
        quiet["spaces_between_special_tokens"] = False
    return lambda ids: cast(str, tokenizer.decode(ids, **quiet))


def _not_exact() -> MoELensError:
    return MoELensError(
        "spans need a fast tokenizer, with offsets, or one that decodes its tokens to the very text they came from; "
        "this slow one does not"
    )
