"""What a process does of each step: its share of the examples, in as many passes as fit its memory."""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moe_lens.data import Encoded, collate
from moe_lens.errors import MoELensError
from moe_lens.lens.batching import unless_out_of_memory
from moe_lens.tuning.methods import Around
from moe_lens.tuning.objective import ANSWER_LOSS, Objective
from moe_lens.tuning.processes import Processes
from moe_lens.tuning.schedule import Schedule


class StepData:
    """The examples of each step, of which this process takes its share."""

    def __init__(
        self,
        prompts: Sequence[Encoded],
        schedule: Schedule,
        pad_id: int,
        processes: Processes,
        around: Around,
        objective: Objective = ANSWER_LOSS,
    ) -> None:
        self.prompts, self.schedule, self.pad_id, self.processes = prompts, schedule, pad_id, processes
        self.around, self.objective = around, objective
        self.steps = schedule.steps(len(prompts))

    def of(self, step: int) -> list[Encoded]:
        """What the model is run on in a step, by all processes."""
        return self.objective.rows(self.prompts, self._places(step))

    def _places(self, step: int) -> list[int]:
        """The places of the examples of a step, of all processes."""
        return self.schedule.order(len(self.prompts), step)

    def backward(self, shared: nn.Module, step: int, autocast: AbstractContextManager[object]) -> float:
        """Makes this step's gradients and returns this process's share of the loss.

        Passes that do not fit in memory are halved, and so are all after them, with a warning: the gradients stay the
        step's. Raises MoELensError if a single example does not fit, and where other processes wait for this one.
        """
        gradients = partial(self._gradients, shared, step, autocast)
        while (loss := unless_out_of_memory(gradients)) is None:
            self._halve(step)
        return loss

    def _halve(self, step: int) -> None:
        """Take half as many examples per pass as memory was too small for; MoELensError where that cannot be."""
        places = self._places(step)
        tried = max(map(len, self._passes(places)))
        longest = max(len(prompt.input_ids) for prompt in self.of(step))
        told = f"out of memory with {tried} of {len(places)} examples of up to {longest} tokens per pass"
        if tried == 1:
            raise MoELensError(f"{told}; use --gradient-checkpointing, or leave out such long examples")
        if self.processes.count > 1:
            raise MoELensError(f"{told}, and other processes wait for as many passes; give a smaller --micro-batch")
        self.schedule = replace(self.schedule, micro_batch=tried // 2)
        warnings.warn(f"{told}; going on with {tried // 2} (--micro-batch)", stacklevel=2)

    def _passes(self, places: Sequence[int]) -> list[list[int]]:
        """Those of these places that are this process's, by forward pass."""
        return self.schedule.passes(places, rank=self.processes.rank, processes=self.processes.count)

    def _gradients(self, shared: nn.Module, step: int, autocast: AbstractContextManager[object]) -> float:
        """As `backward`, in passes as large as they are now; from the start, also where others were left half-way."""
        torch.manual_seed((self.schedule.seed * 1_000_003 + step) * self.processes.count + self.processes.rank)
        shared.zero_grad()
        all_places, count = self._places(step), self.processes.count
        parts, passes = self.objective.parts(self.prompts, all_places), self._passes(all_places)
        total = torch.zeros((), dtype=torch.float64)
        for number, places in enumerate(passes):
            # A process without examples runs some for nothing: the others wait for its part.
            run = places or all_places[:1]
            batch = collate(self.objective.rows(self.prompts, run), self.pad_id)
            last = number + 1 == len(passes)
            sync = nullcontext() if last or not isinstance(shared, DistributedDataParallel) else shared.no_sync()
            with sync, self.around(batch):
                with autocast:
                    loss = self.objective.loss(shared, batch, run) / parts * bool(places)
                (loss * count).backward()  # processes give the mean of their gradients
            total += loss.detach().cpu()
        return total.item()
