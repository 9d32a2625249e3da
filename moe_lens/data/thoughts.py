"""Thoughts that reasoning models put before an answer: where they are opened and closed, and a text without them."""

import re

THOUGHTS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
"""What opens a thought and what closes it, in the chat templates that are known."""

_CLOSED = re.compile("^.*(?:" + "|".join(re.escape(close) for _, close in THOUGHTS) + ")", re.DOTALL)
_OPEN = re.compile("(?:" + "|".join(re.escape(start) for start, _ in THOUGHTS) + ").*$", re.DOTALL)


def without_thoughts(text: str) -> str:
    """What is said after the last thought; a thought that is not closed has nothing after it."""
    return _OPEN.sub("", _CLOSED.sub("", text))


def answer_start(text: str) -> int:
    """Where the answer begins: after the last thought that is closed, and the white space there."""
    thought = _CLOSED.match(text)
    return len(text) - len(text[thought.end() if thought else 0 :].lstrip())


def closed(text: str) -> str:
    """The text, with an empty thought made of a thought that is opened at its end."""
    for start, close in THOUGHTS:
        if text.rstrip().endswith(start):
            return f"{text.rstrip()}\n\n{close}\n\n"
    return text
