"""What a process does of each step: its share of the examples, in as many passes as fit its memory."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moe_lens.data import Encoded, collate
from moe_lens.tuning.objective import answer_loss, answer_tokens
from moe_lens.tuning.processes import Processes
from moe_lens.tuning.schedule import Schedule


class StepData:
    """The examples of each step, of which this process takes its share."""

    def __init__(self, prompts: Sequence[Encoded], schedule: Schedule, pad_id: int, processes: Processes) -> None:
        self.prompts, self.schedule, self.pad_id, self.processes = prompts, schedule, pad_id, processes
        self.steps = schedule.steps(len(prompts))

    def of(self, step: int) -> list[Encoded]:
        """The examples of a step, of all processes."""
        return [self.prompts[place] for place in self.schedule.order(len(self.prompts), step)]

    def backward(self, shared: nn.Module, step: int, autocast: AbstractContextManager[object]) -> float:
        """Adds this step's gradients up and returns this process's share of the loss."""
        prompts = self.of(step)
        tokens, count = answer_tokens(prompts), self.processes.count
        passes = self.schedule.passes(range(len(prompts)), rank=self.processes.rank, processes=count)
        total = torch.zeros((), dtype=torch.float64)
        for number, places in enumerate(passes):
            # A process without examples runs some for nothing: the others wait for its part.
            batch = collate([prompts[place] for place in places or [0]], self.pad_id)
            last = number + 1 == len(passes)
            with nullcontext() if last or not isinstance(shared, DistributedDataParallel) else shared.no_sync():
                with autocast:
                    loss = answer_loss(shared, batch, tokens=tokens) * bool(places)
                (loss * count).backward()  # processes give the mean of their gradients
            total += loss.detach().cpu()
        return total.item()
