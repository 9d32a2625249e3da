"""Schedule: the numbers of a training run, and with them which examples and which rate belong to a step."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from moe_lens.errors import MoELensError


@dataclass(frozen=True)
class Schedule:
    """The numbers of a training run; the defaults are the paper's (Appendix A) where it gives them.

    batch_size: examples per optimizer step, over all processes together.
    micro_batch: examples per forward pass of a process, None for its whole share of the step. It changes memory and
        time, and the result by rounding only. A process that is alone halves it, with a warning, where memory ends.
    warmup: share of the steps in which the rate rises linearly; after it a cosine leads to 0.
    weight_decay: 0, since decay would also move what the task's loss does not ask for. A load-balancing loss is not
        even offered: Eq. 6 is the task's loss alone, and balance would undo the specialisation it brings out.
    max_gradient_norm: gradients are scaled down to this norm.
    evaluate_every: steps between measurements on the dev data, or, below 1, the share of all steps that lies between
        them; None for one after each epoch. The best of these states is what training returns.
    patience: training stops after so many measurements without a new best; None for never.
    gradient_checkpointing: layers keep their inputs only and run again backward: less memory, a third more time.

    Raises MoELensError for numbers that make no sense, such as a batch of 0 or a rate that is not finite.
    """

    learning_rate: float = 5e-4
    epochs: int = 3
    batch_size: int = 8
    micro_batch: int | None = None
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    evaluate_every: int | float | None = None
    patience: int | None = None
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "max_gradient_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise MoELensError(f"{name} must be finite and above 0; got {getattr(self, name)}")
        for name in ("epochs", "batch_size", "micro_batch", "evaluate_every", "patience"):
            value = getattr(self, name)
            if name == "evaluate_every" and value is not None and 0 < value < 1:
                continue
            if value is not None and value < 1:
                raise MoELensError(f"{name} must be at least 1; got {value}")
        if not 0 <= self.weight_decay < math.inf:
            raise MoELensError(f"weight_decay must be finite and at least 0; got {self.weight_decay}")
        if self.seed < 0:
            raise MoELensError(f"seed must be at least 0; got {self.seed}")
        if not 0 <= self.warmup <= 1:
            raise MoELensError(f"warmup is a share of the steps, from 0 to 1; got {self.warmup}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of `step`, counted from 0, of `steps`."""
        warm = self.warmup * steps
        if step < warm:
            return self.learning_rate * (step + 1) / (warm + 1)
        return self.learning_rate * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2

    def steps(self, examples: int) -> int:
        """Optimizer steps in all epochs over that many examples."""
        return self.epochs * self.steps_per_epoch(examples)

    def steps_per_epoch(self, examples: int) -> int:
        """Optimizer steps in one pass over that many examples."""
        return math.ceil(examples / self.batch_size)

    def order(self, examples: int, step: int) -> list[int]:
        """The places of the examples in the batch of `step`: a function of the seed and the step alone."""
        epoch, place = divmod(step, self.steps_per_epoch(examples))
        start = place * self.batch_size
        return list(_shuffled(self.seed, epoch, examples)[start : start + self.batch_size])

    def passes(self, places: Sequence[int], *, rank: int = 0, processes: int = 1) -> list[list[int]]:
        """The forward passes in which process `rank` of `processes` goes through its share of a step's examples.

        Every process gets as many passes, some of them perhaps empty, since they have to keep step with each other.
        """
        largest_share = math.ceil(len(places) / processes)
        size = min(self.micro_batch or largest_share, largest_share)
        own = list(places)[rank::processes]
        return [own[start : start + size] for start in range(0, largest_share, size)]

    def measures_after(self, step: int, examples: int) -> bool:
        """Whether the dev data are measured when `step`, counted from 0, is done; after the last one always."""
        every = self.evaluate_every or self.steps_per_epoch(examples)
        every = every if every >= 1 else math.ceil(every * self.steps(examples))
        return (step + 1) % every == 0 or step + 1 == self.steps(examples)


@lru_cache(maxsize=2)
def _shuffled(seed: int, epoch: int, examples: int) -> tuple[int, ...]:
    """The places of all examples in the order of an epoch."""
    return tuple(random.Random(f"epoch/{seed}/{epoch}").sample(range(examples), examples))
