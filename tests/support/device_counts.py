"""What work on a pretend device costs: the kernels launched and the times that the host waits, each with its line."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import moe_lens

WATCHED = str(Path(moe_lens.__file__).parent)
#: Whose lines say nothing of who asked: of torch and its helpers, of Python's own modules, of this support.
PASSED_OVER = ("/torch/", "/contextlib.py", "/functools.py", "/einops/", "/support/pretend_device.py")


@dataclass
class Cost:
    """kernels: launched, by the line that asked. waits: times the host waited for the device, by its kind and line.

    A line is one of the package where one stands in the call stack, and else the nearest outside torch.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def n_kernels(self) -> int:
        return self.kernels.total()

    @property
    def n_waits(self) -> int:
        return self.waits.total()


_counted: list[Cost] = []
_one_at_a_time = Lock()  # a trace runs in threads, and so does what is computed backward


@contextmanager
def counting() -> Iterator[Cost]:
    """Inside the block, what every thread asks of pretend devices is added to the cost given."""
    cost = Cost()
    _counted.append(cost)
    try:
        yield cost
    finally:
        _counted.remove(cost)


def count_kernel() -> None:
    """One kernel was launched."""
    if _counted:
        line = calling_line()
        with _one_at_a_time:
            for cost in _counted:
                cost.kernels[line] += 1


def count_wait(kind: str) -> None:
    """The host waited for the device once."""
    if _counted:
        line = calling_line()
        with _one_at_a_time:
            for cost in _counted:
                cost.waits[kind, line] += 1


def calling_line() -> str:
    """The nearest line of the package that leads here, and else the nearest that is not torch's: `folder/file.py:3`."""
    frame, other = sys._getframe(1), "backward"  # where nothing of ours is in the stack, torch differentiates
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(WATCHED):
            return f"moe_lens{name.removeprefix(WATCHED)}:{frame.f_lineno}"
        if other == "backward" and name != __file__ and not any(part in name for part in PASSED_OVER):
            other = f"{'/'.join(name.split('/')[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return other
