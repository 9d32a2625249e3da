"""The processes that torchrun or `accelerate launch` started to share one work; this one alone without them."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from moe_lens.errors import MoELensError

Made = TypeVar("Made")

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
