"""The one progress bar: drawn in a terminal or a notebook, a plain line now and then in a log, none where silenced."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from tqdm.auto import tqdm as drawn

EVERY = 10.0
"""Seconds between two lines in a log; what takes less leaves none."""

QUIET, NO_BARS = "MOE_LENS_QUIET", "TQDM_DISABLE"
"""Environment variables, of which any value counts: nothing is said but results; and tqdm's own, no bar is shown."""


def progress_bar(
    iterable: Iterable[Any] | None = None,
    *,
    desc: str = "",
    total: float | None = None,
    initial: float = 0,
    unit: str = "it",
    disable: bool = False,
) -> Any:
    """A bar with tqdm's methods and arguments; the same in rooms, commands and notebooks."""
    kind = drawn if is_drawn() else _Lines
    silent = disable or bool(os.environ.get(NO_BARS)) or is_quiet()
    return kind(iterable, desc=desc or None, total=total, initial=initial, unit=unit, disable=silent)


def write(line: str) -> None:
    """Prints a line above the bars that are drawn; nothing where all is quiet."""
    if not is_quiet():
        (drawn if is_drawn() else _Lines).write(line)


def is_drawn() -> bool:
    """Whether there is a terminal or a notebook to draw in, and not a log."""
    return sys.stderr.isatty() or "ipykernel.zmqshell" in sys.modules


def is_quiet() -> bool:
    """Whether nothing is to be said but results."""
    return bool(os.environ.get(QUIET))


def no_bars_of_others() -> None:
    """transformers, huggingface_hub and datasets draw no bars of their own; to be said before they are imported."""
    os.environ.update({"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"})


@contextmanager
def quietly() -> Iterator[None]:
    """Inside the block, and in processes started there, no bar is shown and nothing said."""
    before = {name: os.environ.get(name) for name in (QUIET, NO_BARS)}
    os.environ.update(dict.fromkeys(before, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Lines(tqdm):
    """tqdm where no cursor can move: in place of the bar a line of its own, at most one in `EVERY` seconds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._said = time.monotonic()
        super().__init__(*args, **kwargs, ncols=0, miniters=1, mininterval=EVERY / 10, leave=False)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Says how far it is, if that is due; tqdm calls this at every change of what is shown, and at the end."""
        now = time.monotonic()
        if now - self._said >= EVERY:
            self._said = now
            self.fp.write(f"{self}\n")
            self.fp.flush()

    def clear(self, nolock: bool = False) -> None:
        """Nothing: what stands in a log stays."""
