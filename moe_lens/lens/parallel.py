"""The processes that torchrun or `accelerate launch` started to share one work; this one alone without them."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from moe_lens.architecture.quantized import is_parallel
from moe_lens.errors import MoELensError
from moe_lens.results import kept, read_if_made_by

Made = TypeVar("Made")
Part = tuple[int, int]
"""Number and of: every of-th of some batches, from the number-th on."""
WHOLE: Part = (0, 1)
_part: ContextVar[Part] = ContextVar("part", default=WHOLE)
_alone: ContextVar[bool] = ContextVar("alone", default=False)

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
    if _alone.get():
        return make()
    state = connected()
    made = [make() if state.is_main_process else None]
    return cast(Made, broadcast_object_list(made)[0])


def done_by_first(make: Callable[[], Made]) -> Made:
    """What `make`, which the first process runs without the others' help, gives, in all of them."""

    def alone() -> Made:
        with _working(alone=True):
            return make()

    return from_first_process(alone)


@contextmanager
def _working(*, alone: bool) -> Iterator[None]:
    """Inside the block this process shares nothing that it does, or, if not alone, what all do."""
    token = _alone.set(alone)
    try:
        yield
    finally:
        _alone.reset(token)


def is_alone() -> bool:
    """Whether no other process does what this one does now."""
    return _alone.get() or connected().num_processes == 1


def lead(work: Callable[[], object]) -> None:
    """Runs `work` in the first process; the others do with it what it asks for by `together`, until it is over.

    An error of the first ends it alone; the launcher then ends the others.
    """
    if connected().is_main_process:
        with _working(alone=True):
            work()
            _tell_others(None)
        return
    while (asked := _tell_others(None)) is not None:
        make, arguments = asked
        make(*arguments)


def together(make: Callable[..., Made], *arguments: object) -> Made:
    """What `make`, a function at the top of a module, gives of these arguments; inside `lead` all processes run it."""
    if connected().num_processes == 1:
        return make(*arguments)
    _tell_others((make, arguments))
    with _working(alone=False):
        return make(*arguments)


def _tell_others(asked: tuple[Callable[..., object], tuple[object, ...]] | None) -> Any:
    """What the first process says, in all of them."""
    with _working(alone=False):
        return from_first_process(lambda: asked)


def kept_by_all(
    path: str | Path | None, made_by: dict[str, Any], make: Callable[[], pd.DataFrame], module: nn.Module
) -> pd.DataFrame:
    """`kept`; of a model that the processes hold together all run `make`, and the first one keeps what it gives."""
    if not is_parallel(module):
        return kept(path, made_by, make)
    found = from_first_process(lambda: read_if_made_by(path, made_by))
    if found is not None:
        return found
    found = make()
    return from_first_process(lambda: kept(path, made_by, lambda: found))


def part_of_work(module: nn.Module) -> Part:
    """Which pieces of a work on this model are this process's.

    `WHOLE` of a model that the processes hold together: it runs only where all of them do the same.
    """
    state = connected()
    return WHOLE if is_alone() or is_parallel(module) else (state.process_index, state.num_processes)


def gathered(found: Iterable[Made], part: Part) -> list[Made]:
    """What all processes find in their parts, in each of them; found: gives what this one does.

    A MoELensError of one of them is raised in all, none of which then waits for what never comes.
    """
    if part == WHOLE:
        return list(found)
    own: list[Made] = []
    failed: MoELensError | None = None
    try:
        own.extend(found)
    except MoELensError as error:
        failed = error
    told = cast(list[tuple[list[Made], MoELensError | None]], gather_object([(own, failed)]))
    if failures := [error for _, error in told if error is not None]:
        raise failed or failures[0]
    return [one for theirs, _ in told for one in theirs]


@contextmanager
def sharing() -> Iterator[None]:
    """Inside the block, which all processes run alike, what is measured is shared: each takes its batches of one plan.

    Counts are then those of one process bit for bit, other sums to rounding, in each process. Of a model that the
    processes hold together each takes all batches. Without others nothing changes.
    """
    state = connected()
    token = _part.set(WHOLE if is_alone() else (state.process_index, state.num_processes))
    try:
        yield
    finally:
        _part.reset(token)


def own_part(module: nn.Module) -> Part:
    """Which batches are this process's; `WHOLE` outside a `sharing` block, and as `part_of_work` says."""
    return WHOLE if is_parallel(module) else _part.get()


def is_first() -> bool:
    """Whether this process is the one that writes; without a `sharing` block each is."""
    return _part.get()[0] == 0


def agreed_on(found: Made) -> Made:
    """What was found by all processes of a `sharing` block together, as the first has it: sums differ by rounding."""
    return agreed(lambda: found)


def agreed(make: Callable[[], Made]) -> Made:
    """What `make` gives: in a `sharing` block that of the first process, in all of them."""
    return make() if _part.get() == WHOLE else from_first_process(make)


def expect_shareable(statistics: Sequence[Any], part: Part) -> None:
    """MoELensError for statistics that cannot be joined, or have seen something already, if each process has a part."""
    if part == WHOLE:
        return
    for one in statistics:
        if not hasattr(one, "add_state"):
            raise MoELensError(f"{type(one).__name__} is not shared over processes; take one process, or --shard")
        if len(one.state()):
            raise MoELensError(f"{type(one).__name__} has seen examples already, which each process would count")


def join_others(statistics: Sequence[Any], part: Part, run: Callable[[], object]) -> None:
    """Runs what updates them with this process's part, and adds to each what the others have seen in theirs."""

    def states() -> Iterator[list[Any]]:
        run()
        yield [] if part == WHOLE else [one.state() for one in statistics]

    for place, theirs in enumerate(gathered(states(), part)):
        if part != WHOLE and place != part[0]:
            for one, state in zip(statistics, theirs, strict=True):
                one.add_state(state)
