"""The trainings of one command: routers first where a score asks for them, the choice of experts, then the method."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from moe_lens.choosing.scores import Score
from moe_lens.choosing.tuned_scores import expert_scores, restored, with_delta
from moe_lens.commands import console
from moe_lens.data import Example
from moe_lens.lens.delta import weights_digest
from moe_lens.lens.lens import MoELens
from moe_lens.report.plots import tuning_figure
from moe_lens.results import provenance, read_if_made_by, write_json, write_table
from moe_lens.tuning.methods import Method, TuneRouters, router_parameters, save_trained
from moe_lens.tuning.processes import Processes
from moe_lens.tuning.schedule import Schedule
from moe_lens.tuning.training import DevMetric, Tuned, tune


@dataclass(frozen=True)
class Stage:
    """What the trainings of one command share.

    lens: the base model; called `model`. train, dev: examples. facts: of the data, for the provenance.
    score, max_length, max_new_tokens, checkpoint_seconds: as `tune` takes them.
    """

    lens: MoELens
    model: str
    train: Sequence[Example]
    dev: Sequence[Example]
    schedule: Schedule
    facts: Mapping[str, Any]
    score: DevMetric
    max_length: int
    max_new_tokens: int
    checkpoint_seconds: float

    def run(self, method: Method, out: Path, rates: Sequence[float], *, shard: bool = False) -> Tuned:
        """Train, or go on in `out`; afterwards the first process writes the delta, the log and the figure there."""
        tuned = tune(
            self.lens,
            self.train,
            self.dev,
            method,
            self.schedule,
            learning_rates=rates,
            out=out,
            score=self.score,
            max_length=self.max_length,
            max_new_tokens=self.max_new_tokens,
            checkpoint_seconds=self.checkpoint_seconds,
            shard=shard,
        )
        if Processes.current().is_main:
            self._write(tuned, method, out)
        return tuned

    @contextmanager
    def tuned_routers(self, folder: Path, rates: Sequence[float], delta: Path | None) -> Iterator[None]:
        """Inside the block the lens's routers are tuned: those of `delta`, or else tuned now and kept in `folder`."""
        if delta is not None:
            with with_delta(self.lens, delta):
                yield
            return
        with restored(self.lens, router_parameters(self.lens)):
            self.run(TuneRouters(), folder, rates)
            yield

    def scores(self, score: Score, out: Path, rates: Sequence[float], delta: Path | None) -> pd.DataFrame:
        """Every expert's score on the training examples, kept in `out`; routers are tuned if it asks for them."""
        by = {"score": score.name, "weights": weights_digest(self.lens.module)}
        if score.needs_tuned and delta is None:
            dev = (self.score, self.max_length, self.max_new_tokens)
            by["routers"] = {"rates": list(rates), "schedule": repr(self.schedule), "dev": dev}
        made_by = provenance(model=self.model, data=self.train, seed=self.schedule.seed, delta=delta, facts=by)
        file = out / "experts.parquet"
        table = read_if_made_by(file, made_by)
        Processes.current().wait()  # all have looked before the first writes
        if table is None:
            table = expert_scores(
                score, self.lens, self.train, lambda: self.tuned_routers(out / "router", rates, delta)
            )
            if Processes.current().is_main:
                write_table(table, file, made_by)
        return table

    def _write(self, tuned: Tuned, method: Method, out: Path) -> None:
        schedule = {name: value for name, value in asdict(tuned.schedule).items() if name != "seed"}
        facts = {**method.facts(), **schedule, **self.facts, "trainable": tuned.trained.count}
        made_by = provenance(model=self.model, data=self.train, seed=self.schedule.seed, facts=facts)
        save_trained(self.lens.module, tuned.trained, out, facts=made_by)
        write_table(tuned.log, out / "tuning.parquet", made_by)
        write_table(tuned.candidates, out / "learning_rates.parquet", made_by)
        write_json(out / "cost.json", {"seconds": tuned.seconds, "trainable": tuned.trained.count})
        console.save_figure(tuning_figure(tuned.log), out / "tuning.html")
