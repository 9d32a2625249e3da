"""The processes that torchrun or `accelerate launch` started to share one work; this one alone without them."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from moe_lens.architecture.quantized import is_parallel
from moe_lens.errors import MoELensError

Made = TypeVar("Made")
Part = tuple[int, int]
"""Number and of: every of-th of some batches, from the number-th on."""
WHOLE: Part = (0, 1)
_part: ContextVar[Part] = ContextVar("part", default=WHOLE)

PATIENCE = timedelta(hours=12)
"""How long a process waits for the others."""


def connected() -> PartialState:
    """What the launcher set up; the first call connects the processes.

    Raises MoELensError if they were left unconnected by another's first call, since each would do all of the work.
    """
    # Without an accelerator it has to be told to look for other processes.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    if state.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise MoELensError(
            f"a launcher started {os.environ['WORLD_SIZE']} processes and accelerate sees {state.num_processes}; "
            "on the CPU let nothing use accelerate before, or call accelerate.PartialState(cpu=True) first"
        )
    return state


def from_first_process(make: Callable[[], Made]) -> Made:
    """What `make` gives in the first process, in all of them."""
    state = connected()
    made = [make() if state.is_main_process else None]
    return cast(Made, broadcast_object_list(made)[0])


def expect_whole_model(module: nn.Module) -> None:
    """MoELensError for a model that several processes hold together, where each is to take examples of its own."""
    if is_parallel(module):
        raise MoELensError(
            "the processes hold the parts of one model, so they cannot share examples; in a program of your own that "
            "all of them run, lens.records, lens.measure, lens.generate and the like take all examples on each"
        )


@contextmanager
def sharing() -> Iterator[None]:
    """Inside the block, which all processes run alike, what is measured is shared: each takes its batches of one plan.

    Counts are then those of one process bit for bit, other sums to rounding, in each process. Without others nothing
    changes.
    """
    state = connected()
    token = _part.set((state.process_index, state.num_processes))
    try:
        yield
    finally:
        _part.reset(token)


def own_part() -> Part:
    """Which batches are this process's; `WHOLE` outside a `sharing` block."""
    return _part.get()


def agreed(make: Callable[[], Made]) -> Made:
    """What `make` gives: in a `sharing` block that of the first process, in all of them."""
    return make() if own_part() == WHOLE else from_first_process(make)


def expect_shareable(statistics: Sequence[Any], module: nn.Module) -> None:
    """MoELensError, in a `sharing` block, for statistics that cannot be joined, or have seen something already."""
    if own_part() == WHOLE:
        return
    expect_whole_model(module)
    for one in statistics:
        if not hasattr(one, "add_state"):
            raise MoELensError(f"{type(one).__name__} is not shared over processes; take one process, or --shard")
        if len(one.state()):
            raise MoELensError(f"{type(one).__name__} has seen examples already, which each process would count")


def join_others(statistics: Sequence[Any]) -> None:
    """Adds to each statistic what the other processes of a `sharing` block have seen."""
    number, of = own_part()
    if of == 1:
        return
    states = gather_object([[one.state() for one in statistics]])
    for place, theirs in enumerate(states):
        if place != number:
            for one, state in zip(statistics, theirs, strict=True):
                one.add_state(state)
