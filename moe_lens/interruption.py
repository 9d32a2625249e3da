"""Ctrl-C in a command: one line that says how to go on, also while its packages are still being imported."""

import sys
from types import TracebackType

INTERRUPTED = "interrupted: give the same command again, and it goes on with what is finished"


def tell_interruption() -> None:
    """From now on a Ctrl-C that nothing catches ends the process with that line in place of a traceback."""
    sys.excepthook = _told


def _told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print(INTERRUPTED, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
