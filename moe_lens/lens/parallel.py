"""The processes that torchrun or `accelerate launch` started to share one work; this one alone without them."""

import os
from datetime import timedelta

import torch
from accelerate import PartialState

from moe_lens.errors import MoELensError

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
