"""Where sentences end: a text as its sentences, by punctuation, in scripts with and without spaces."""

import regex

_SHORT = "Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Gen|Col|Lt|Capt|Sgt|Rev|Mt|No|Vol|Fig|Inc|Ltd|Co|Corp|vs|cf|ca|approx|e\\.g|i\\.e"
"""Words after whose full stop a sentence goes on."""
_CLOSING = r"""["'”’»)\]]*"""
_END = regex.compile(
    rf"(?:(?<=[.!?…؟।]\s?{_CLOSING})(?<!\b(?:\p{{Lu}}|{_SHORT})\s?\.)\s+(?!\p{{Ll}}|\p{{P}}*\p{{Ll}})"
    rf"|(?<=[。！？｡][」』”’）]*)(?![。！？｡」』”’）])\s*|\n\s*\n\s*)"
)
"""Between two sentences: after a mark that ends one, unless a small letter, an initial or an abbreviation says not."""


def sentences(text: str) -> list[slice]:
    """The character ranges of a text's sentences, one after another; each with the white space up to the next."""
    starts = [0, *(end.end() for end in _END.finditer(text) if 0 < end.end() < len(text))]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(text)], strict=True) if stop > start]
