"""Where words end, in every script: which places of a text hold an answer, and what its words are."""

import unicodedata
from collections.abc import Sequence

import regex

_SCRIPTS = (
    "Thai", "Lao", "Khmer", "Myanmar", "Tai_Le", "New_Tai_Lue", "Tai_Tham", "Tai_Viet", "Javanese", "Balinese",
    "Han", "Hiragana", "Katakana", "Bopomofo", "Yi",
    "Hangul",  # whose particles follow a word without a space
)  # fmt: skip
_UNSPACED = "".join(rf"\p{{Script={name}}}" for name in _SCRIPTS) + r"\u30FC\uFF70"  # and the mark of long vowels
_JOINED = r"[\p{M}\p{Emoji_Modifier}\u200C\u200D\u00AD\u1160-\u11FF\uD7B0-\uD7FF\u0E33\u0EB3]"
"""What goes on with the character before it: marks, joiners, soft hyphens, and the later letters of a syllable."""
_LETTER = rf"[[\p{{L}}\p{{N}}\p{{Pc}}]--[[{_UNSPACED}]--\p{{Nd}}]--{_JOINED}]"
"""A letter or digit of a script that puts spaces between words, and any script's digits."""
_BARE = rf"[[\p{{L}}\p{{N}}]--{_JOINED}]"
_SEPARATOR = "[.,\u066b\u066c]"
"""What stands within numbers: "3" is not in "3.5", nor "234" in "1,234"."""

_STARTS_LETTER = regex.compile(rf"{_JOINED}*{_LETTER}", regex.V1)
_STARTS_JOINED = regex.compile(_JOINED, regex.V1)
_ENDS_LETTER = regex.compile(rf"{_LETTER}{_JOINED}*\Z", regex.V1)
_WORD = regex.compile(
    rf"(?:[{_BARE}&&{_LETTER}]{_JOINED}*)+|{_BARE}{_JOINED}*",
    regex.V1,
)


def occurrences(answers: Sequence[str], context: str) -> list[slice]:
    """Character ranges of all gold answers in a context, in rising order.

    An answer counts where it stands as whole words: "9" is not in "1939" nor in "1.9". In scripts without spaces
    between words, and next to them, it counts wherever it stands, if it does not end within a character (before its
    vowel sign or accent, in the middle of an emoji). Composed and decomposed characters are the same.
    """
    found = {match.span() for answer in answers for match in _pattern(answer).finditer(context)}
    return [slice(*span) for span in sorted(found)]


def words(text: str) -> list[str]:
    """The words of a text: runs of letters and digits with their marks; one character each where none are spaced."""
    return [match.group() for match in _WORD.finditer(text)]


def _pattern(answer: str) -> regex.Pattern[str]:
    """What finds an answer between the ends of words, in any normal form."""
    before, after = [r"(?<!\u200D)"], [rf"(?!{_JOINED})"]
    if _STARTS_JOINED.match(answer):
        before.append(rf"(?<![\p{{L}}\p{{N}}\p{{S}}]{_JOINED}*)")
    elif _STARTS_LETTER.match(answer):
        before.append(rf"(?<!{_LETTER}{_JOINED}*)")
    if _ENDS_LETTER.search(answer):
        after.append(rf"(?!{_LETTER})")
    if answer[0].isdecimal():
        before.append(rf"(?<!\p{{Nd}}{_SEPARATOR})")
    if answer[-1].isdecimal():
        after.append(rf"(?!{_SEPARATOR}\p{{Nd}})")
    forms = dict.fromkeys(unicodedata.normalize(form, answer) for form in ("NFC", "NFD")) | {answer: None}
    either = "|".join(map(regex.escape, forms))
    return regex.compile(f"{''.join(before)}(?:{either}){''.join(after)}", regex.V1)
