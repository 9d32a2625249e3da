"""The training loop: chosen parameters, the paper's schedule, and a run that any interruption leaves whole."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_lens.data import Encoded
from moe_lens.errors import MoELensError
from moe_lens.progress import progress_bar
from moe_lens.tuning.checkpoint import Checkpoints, Progress
from moe_lens.tuning.methods import Around
from moe_lens.tuning.objective import ANSWER_LOSS, Objective
from moe_lens.tuning.processes import (
    Processes,
    empty,
    put,
    put_together,
    restore_training_state,
    training_state,
    values,
)
from moe_lens.tuning.schedule import Schedule
from moe_lens.tuning.state import evaluating, training
from moe_lens.tuning.steps import StepData

BYTES_PER_PARAMETER = 32
"""What a run's checkpoints take at most: newest (value and two of AdamW's) and best, each twice while it is written."""


@dataclass(frozen=True)
class DevScore:
    """How well the model does on the dev data: `measure()` gives a number, the higher the better.

    name: its column in the log, such as "dev_em". routing: what is noted of the routers then (`RoutingWatch.now`).
    """

    name: str
    measure: Callable[[], float]
    routing: Callable[[], dict[str, list[float]]] | None = None


def fit(
    module: nn.Module,
    parameters: Sequence[str],
    prompts: Sequence[Encoded],
    schedule: Schedule,
    *,
    pad_id: int,
    dev: DevScore | None = None,
    checkpoints: Checkpoints | None = None,
    shard: Sequence[str] = (),
    around: Around = nullcontext,
    objective: Objective = ANSWER_LOSS,
    label: str = "training",
    follow: Callable[[Mapping[str, Any]], None] | None = None,
) -> Progress:
    """Trains the named parameters in place, all others frozen, and tells how it went; `log_table` has its log.

    prompts: encoded with their answers. objective: the loss, by default the mean cross-entropy of a step's answer
        tokens (Eq. 6); a mean over the whole step also where several forward passes and processes share it.
    dev: measured as the schedule says; the model ends in the state that was best (the first of equals), and without
        it in its last.
    checkpoints: where to keep the run; if it was begun there, it goes on, on the CPU to the same bytes.
    shard: paths of the layers to split over the processes (FSDP2). What is split is the first process's module; those
        of the others may be on the meta device. Afterwards the first process has it whole, on the CPU, to be saved, and
        the others have it on the meta device, as all have after an exception; no process can run it.
    around: what the module runs each batch in, of a method that adds to the model (`Trainable.around`).
    follow: is given each row of the log, by the first process.

    Afterwards `module` is in evaluation mode, nothing in it requires a gradient, and all has its old dtype.
    Raises MoELensError for no prompts, no or unknown parameters, a loss or gradient that is not finite, and checkpoints
    that are another run's or cannot be written.
    """
    if not prompts:
        raise MoELensError("there is nothing to train on: expected one or more examples")
    named = _parameters(module, parameters)
    if checkpoints is not None:
        checkpoints.make_room(BYTES_PER_PARAMETER * sum(parameter.numel() for parameter in named.values()))
    processes = Processes.current()
    split_on = processes.device if processes.splits(shard) else None
    if split_on is not None:
        processes.match_first(module)
    dtypes = {name: parameter.dtype for name, parameter in named.items()}
    checkpointing = schedule.gradient_checkpointing
    with training(module, named, gradient_checkpointing=checkpointing, split_on=split_on) as autocast:
        try:
            if split_on is not None:
                named.clear()  # or they would stay in memory, whole
            shared = processes.share(module, shard)
            data = StepData(prompts, schedule, pad_id, processes, around, objective)
            progress = _Run(module, shared, dtypes, data, dev, checkpoints, autocast, follow).to_the_end(label)
            if split_on is not None:
                put_together(module, keep=processes.is_main)
        except BaseException:
            if split_on is not None:
                empty(module)  # the others may never come to put it together
            raise
    return progress


def log_table(progress: Progress) -> pd.DataFrame:
    """The log of a run, a row per step: step, loss, learning_rate, gradient_norm.

    loss: mean nats per answer token, or of another objective what it says.
    gradient_norm: before it is bounded. A dev score has a column of its own, empty where it was not measured.
    """
    return pd.DataFrame([{name: value for name, value in row.items() if name != "routing"} for row in progress.rows])


class _Run:
    """One run of `fit`: the optimizer and how far it has come."""

    def __init__(
        self,
        module: nn.Module,
        shared: nn.Module,
        dtypes: Mapping[str, torch.dtype],
        data: StepData,
        dev: DevScore | None,
        checkpoints: Checkpoints | None,
        autocast: AbstractContextManager[object],
        follow: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self.module, self.shared, self.dtypes, self.data = module, shared, dtypes, data
        self.dev, self.checkpoints, self.autocast, self.follow = dev, checkpoints, autocast, follow
        self.schedule, self.processes = data.schedule, data.processes
        self.trained = _parameters(module, dtypes)  # splitting a model makes new ones
        decay = self.schedule.weight_decay
        self.optimizer = torch.optim.AdamW(self.trained.values(), weight_decay=decay, fused=True)
        self.progress = Progress()
        self.rows: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] = {}
        self.between_steps = True
        self.started = self.saved = time.perf_counter()

    def to_the_end(self, label: str) -> Progress:
        """Begin, or go on from the newest checkpoint, and train to the last step or until patience ends.

        Ctrl-C leaves a checkpoint of the last whole step, except of several processes, which would wait for each other.
        """
        self._resume()
        try:
            return self._trained(label)
        except KeyboardInterrupt:
            if self.between_steps and not self.progress.finished and self.processes.count == 1:
                self._save()
            raise

    def _trained(self, label: str) -> Progress:
        if self.rows and self.dev is not None and self.dev.name not in self.rows[-1]:
            measured = self._measure_and_keep(self.rows[-1])  # where it was interrupted
            if measured and self.checkpoints is not None and self.processes.is_main:
                self.checkpoints.write_log(tuple(self.rows))
        silent = not self.processes.is_main
        with progress_bar(
            total=self.data.steps, initial=self.progress.step, desc=label, unit="step", disable=silent
        ) as counter:
            seen, began = 0, time.perf_counter()
            while not (self.progress.finished or self._is_over()):
                row = self._step()
                seen += sum(len(prompt.input_ids) for prompt in self.data.of(self.progress.step - 1))
                counter.update()
                speed = f"{seen / (time.perf_counter() - began):,.0f}"
                rate = f"{row['learning_rate']:.1e}"
                counter.set_postfix({"loss": f"{row['loss']:.3f}", "rate": rate, "tokens/s": speed}, refresh=False)
        if not self.progress.finished:
            self._finish()
        return self.progress

    def _is_over(self) -> bool:
        patience = self.schedule.patience
        return self.progress.step == self.data.steps or (patience is not None and self.progress.misses >= patience)

    def _step(self) -> dict[str, Any]:
        """One optimizer step, measured and kept where that is due; returns its row of the log."""
        step, schedule = self.progress.step, self.schedule
        rate = schedule.rate(step, self.data.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        share = self.data.backward(self.shared, step, self.autocast)
        length = nn.utils.clip_grad_norm_(self.trained.values(), schedule.max_gradient_norm)
        norm = (length.full_tensor() if isinstance(length, DTensor) else length).item()
        loss, due = self.processes.sums(share, self.processes.is_main and self._save_is_due())
        self._check(step, loss, norm)
        self.between_steps = False
        self.optimizer.step()
        row: dict[str, Any] = {"step": step + 1, "loss": loss, "learning_rate": rate, "gradient_norm": norm}
        self.progress = replace(self.progress, step=step + 1)
        self.rows.append(row)
        self.between_steps = True
        measured = self._measure_and_keep(row)
        if self.checkpoints is not None and self.processes.is_main:
            self.checkpoints.append_log(row)
        if self.follow is not None and self.processes.is_main:
            self.follow(row)
        if due and not measured:
            self._save()
        return row

    def _measure_and_keep(self, row: dict[str, Any]) -> bool:
        """The dev score after the step of this row, where it is due, and a checkpoint with it; whether it was."""
        if self.dev is None or not self.schedule.measures_after(self.progress.step - 1, len(self.data.prompts)):
            return False
        row |= self._measure(self.dev)
        self.between_steps = True
        self._save()
        return True

    def _measure(self, dev: DevScore) -> dict[str, Any]:
        """The dev score now, and the routing that is watched, for the log; the best state so far is kept."""
        with evaluating(self.module, self.dtypes, self.autocast):
            score = dev.measure()
            watched = dev.routing() if dev.routing is not None and self.processes.is_main else None
        found: dict[str, Any] = {dev.name: score} | ({} if watched is None else {"routing": watched})
        self.between_steps = False
        if self.progress.best_score is not None and score <= self.progress.best_score:
            self.progress = replace(self.progress, misses=self.progress.misses + 1)
            return found
        self.progress = replace(self.progress, best_step=self.progress.step, best_score=score, misses=0)
        best = values(self.trained, keep=self.checkpoints is None or self.processes.is_main)
        if self.checkpoints is None:
            self.best = best
        elif self.processes.is_main:
            self.checkpoints.save_best(self.progress.step, best)
        return found

    def _check(self, step: int, loss: float, norm: float) -> None:
        """Stops a run that has left the numbers, before the step is taken; the state before it is kept."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        self._save()
        what, value = ("gradient", norm) if math.isfinite(loss) else ("loss", loss)
        ids = ", ".join(dict.fromkeys(prompt.id for prompt in self.data.of(step)))
        kept = "" if self.checkpoints is None else f"; {self.checkpoints.newest} holds the last good state"
        raise MoELensError(
            f"the {what} became {value} at step {step + 1} of {self.data.steps} (examples {ids}){kept}; "
            "use a lower learning rate, or look at these examples"
        )

    def _save_is_due(self) -> bool:
        return self.checkpoints is not None and time.perf_counter() - self.saved >= self.checkpoints.every

    def _so_far(self) -> Progress:
        """The progress with its log and the time spent."""
        now = time.perf_counter()
        self.progress = replace(
            self.progress, rows=tuple(self.rows), seconds=self.progress.seconds + now - self.started
        )
        self.started = now
        return self.progress

    def _save(self) -> None:
        if self.checkpoints is None:
            return
        state = training_state(self.trained, self.optimizer, keep=self.processes.is_main)
        if self.processes.is_main:
            self.checkpoints.save(self._so_far(), state)
        self.processes.wait()
        self.saved = time.perf_counter()

    def _resume(self) -> None:
        found = None if self.checkpoints is None else self.checkpoints.load()
        self.processes.wait()  # all have read before one may write
        if found is not None:
            self.progress, state = found
            self.rows = list(self.progress.rows)
            restore_training_state(self.trained, self.optimizer, state)
        if self.checkpoints is not None and self.processes.is_main:
            self.checkpoints.write_log(self.progress.rows)

    def _finish(self) -> None:
        """Go back to the best state, and keep it instead of what going on would need."""
        self.between_steps = False
        step = self.progress.best_step
        if step is not None and step != self.progress.step:
            best = self.best if self.checkpoints is None else self.checkpoints.load_best(step)
            for name, value in best.items():
                put(self.trained[name], value)
        self.progress = replace(self._so_far(), finished=True)
        if self.checkpoints is not None:
            found = values(self.trained, keep=self.processes.is_main)
            self.processes.wait()  # all have read the best before it goes
            if self.processes.is_main:
                self.checkpoints.save(self.progress, found)
            self.processes.wait()


def _parameters(module: nn.Module, names: Sequence[str] | Mapping[str, torch.dtype]) -> dict[str, nn.Parameter]:
    known = dict(module.named_parameters())
    if not names:
        raise MoELensError("there is nothing to train: expected the names of one or more parameters")
    missing = [name for name in names if name not in known]
    if missing:
        raise MoELensError(f"the model has no parameters {', '.join(missing)}; see its named_parameters()")
    return {name: known[name] for name in names}
