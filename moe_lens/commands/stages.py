"""What a training command does: which options go together, the routers first where a score asks, then the method."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from moe_lens.choosing.measuring import Models, score_tables
from moe_lens.choosing.scores import SCORES
from moe_lens.choosing.selection import Ground, Selection, Share, Top, choices
from moe_lens.commands import console
from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens.delta import changed_parameters, restored, weights_digest, with_delta
from moe_lens.lens.lens import MoELens
from moe_lens.lens.parallel import done_by_first, from_first_process
from moe_lens.lens.positions import Positions
from moe_lens.report.plots import tuning_figure
from moe_lens.results import data_digest, provenance, write_json, write_table
from moe_lens.tuning.board import BOARDS
from moe_lens.tuning.low_rank import TuneLowRank, check_low_rank
from moe_lens.tuning.methods import (
    Method,
    TuneAll,
    TuneExperts,
    TuneParts,
    TuneRouters,
    router_parameters,
    save_trained,
)
from moe_lens.tuning.preference import DPO
from moe_lens.tuning.processes import Processes
from moe_lens.tuning.router_bias import TuneBias
from moe_lens.tuning.schedule import Schedule
from moe_lens.tuning.training import DevMetric, Tuned, told, tune

METHODS = ("router", "ceft", "esft", "fft", "bias")
ESFT_DEFAULT = Share(SCORES["esft-token"], 0.2)


@dataclass(frozen=True)
class Stage:
    """What the trainings of one command share.

    lens: the base model; called `model`. train, dev: examples. facts: of both, for the provenance.
    score, max_length, max_new_tokens, checkpoint_seconds, objective: as `tune` takes them; routers that are tuned to
    choose experts learn the answers whatever the objective. boards: of BOARDS, those that show the logs.
    shard: the processes hold the model together while it learns; the first has the whole, and does alone all else.
    """

    lens: MoELens
    model: str
    train: Sequence[Example]
    dev: Sequence[Example]
    schedule: Schedule
    facts: Mapping[str, Any]
    score: DevMetric
    max_length: int | None
    max_new_tokens: int
    checkpoint_seconds: float
    objective: DPO | None = None
    boards: Sequence[str] = ()
    shard: bool = False

    def made_by(self, routers: Path | None) -> dict[str, Any]:
        """What tells a training command's work from another's, besides what is trained and at which rates.

        routers: the folder of the delta that experts are chosen by. How a step is computed, by rounding only, is left
        out.
        """
        dev = {"score": self.score, "max_length": self.max_length, "max_new_tokens": self.max_new_tokens}
        facts = {"schedule": told(self.schedule), "dev": data_digest(self.dev) | dev, **self.facts}
        return provenance(model=self.model, delta=routers, data=self.train, facts=facts)

    def run(self, method: Method, out: Path, rates: Sequence[float]) -> Tuned:
        """Train, or go on in `out`; afterwards the first process writes what was learnt, log and figure there."""
        return self._run(method, out, rates, self.objective)

    def _run(self, method: Method, out: Path, rates: Sequence[float], objective: DPO | None) -> Tuned:
        tuned = tune(
            self.lens,
            self.train,
            self.dev,
            method,
            self.schedule,
            objective=objective,
            learning_rates=rates,
            out=out,
            score=self.score,
            max_length=self.max_length,
            max_new_tokens=self.max_new_tokens,
            checkpoint_seconds=self.checkpoint_seconds,
            shard=self.shard,
            boards=[partial(BOARDS[name], out) for name in self.boards],
        )
        if Processes.current().is_main:
            self._write(tuned, method, out, objective)
        return tuned

    @contextmanager
    def tuned_routers(self, folder: Path, rates: Sequence[float], delta: Path | None) -> Iterator[MoELens]:
        """Inside the block the lens's routers are tuned: those of `delta`, or else tuned now and kept in `folder`."""
        if delta is not None:
            others = set(changed_parameters(delta)) - set(router_parameters(self.lens))
            if others:
                raise MoELensError(
                    f"--router-delta takes tuned routers; the delta at {delta} changes {len(others)} parameters "
                    f"that are no routers, such as {min(others)}"
                )
            with with_delta(self.lens.module, delta, template=self.lens.template):
                yield self.lens
            return
        with restored(self.lens.module, router_parameters(self.lens)):
            self._run(TuneRouters(), folder, rates, None)
            yield self.lens

    def chosen(
        self,
        selection: Selection,
        out: Path,
        rates: Sequence[float],
        delta: Path | None,
        layers: Sequence[int] | None,
    ) -> ExpertSet:
        """The experts that a selection names, ranked on the training examples; routers are tuned if its score asks.

        Its score is kept in `out`. rates, delta: of these routers, as in `tuned_routers`.
        """
        tables = {}
        if selection.score is not None:
            weights = done_by_first(lambda: weights_digest(self.lens.module))
            by: dict[str, Any] = {"weights": weights, "template": self.lens.template.facts()}
            if selection.score.needs_tuned and delta is None:
                dev = (self.score, self.max_length, self.max_new_tokens)
                by["routers"] = {"rates": list(rates), "schedule": repr(self.schedule), "dev": dev}
                by["dev"] = data_digest(self.dev)
            seed = self.schedule.seed
            made_by = provenance(model=self.model, data=self.train, seed=seed, delta=delta, facts=by)
            models = Models(
                base=lambda: nullcontext(self.lens),
                tuned=lambda: self.tuned_routers(out / "router", rates, delta),
            )
            score = selection.score

            def measured() -> dict[str, pd.DataFrame]:
                return score_tables([score], models, self.train, out=out, made_by=made_by)

            tables = done_by_first(measured) if self.shard else measured()
        ground = Ground(self.lens.architecture, self.model, tables, seed=self.schedule.seed, layers=layers)
        [choice] = choices([selection], ground)
        return from_first_process(lambda: choice.experts)  # a near tie must not come out otherwise in another

    def _write(self, tuned: Tuned, method: Method, out: Path, objective: DPO | None) -> None:
        schedule = {name: value for name, value in asdict(tuned.schedule).items() if name != "seed"}
        facts = {**method.facts(), **schedule, **self.facts, "trainable": tuned.trained.count}
        facts |= {} if objective is None else objective.facts() | {"unpaired": tuned.unpaired}
        made_by = provenance(model=self.model, data=self.train, seed=self.schedule.seed, facts=facts)
        if tuned.trained.added is None:
            save_trained(self.lens.module, tuned.trained, out, facts=made_by)
        else:
            tuned.trained.added.intervention().save(out, made_by=made_by)
        write_table(tuned.log, out / "tuning.parquet", made_by)
        if len(tuned.routing):
            write_table(tuned.routing, out / "routing_course.parquet", made_by)
        write_table(tuned.candidates, out / "learning_rates.parquet", made_by)
        write_json(out / "cost.json", {"seconds": tuned.seconds, "trainable": tuned.trained.count})
        console.save_figure(tuning_figure(tuned.log), out / "tuning.html")


@dataclass(frozen=True)
class Asked:
    """What is to be trained, as the options say it; MoELensError for those that do not go together."""

    method: str
    experts: Selection | None
    layers: tuple[int, ...] | None
    router_delta: Path | None
    router_rate: str | None
    lora_rank: int | None
    lora_alpha: float | None
    seed: int
    positions: Positions | None = None
    lora_on: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise MoELensError(f"--method must be one of {', '.join(METHODS)}; got {self.method!r}")
        if self.method not in ("ceft", "esft"):
            if any(given is not None for given in (self.experts, self.router_delta, self.router_rate)):
                raise MoELensError(
                    f"--experts, --router-delta and --router-rate are for ceft and esft; --method is {self.method}"
                )
        elif self.router_delta is not None or self.router_rate is not None:
            self._check_routers()
        if self.layers is not None and self.method == "fft":
            raise MoELensError("--layers is for router, ceft, esft and bias; fft trains everything")
        if self.lora_rank is not None and (self.method == "bias" or (self.method == "fft" and self.lora_on is None)):
            raise MoELensError(
                f"--lora-rank is for router, ceft and esft, which say what it is put on, and for fft with --lora-on; "
                f"--method is {self.method}"
            )
        if self.lora_on is not None and (self.method != "fft" or self.lora_rank is None):
            raise MoELensError("--lora-on says where --method fft puts LoRA; give both it and --lora-rank")
        if self.positions is not None and self.method != "bias":
            raise MoELensError(
                f"--positions says where a bias acts, and weights act everywhere; --method is {self.method}"
            )
        if self.lora_alpha is not None and self.lora_rank is None:
            raise MoELensError("--lora-alpha scales the product of --lora-rank; give that too")
        if self.lora_rank is not None:
            check_low_rank(self.lora_rank, self.lora_alpha)
        if self.lora_on is not None:
            TuneParts(self.lora_on)  # MoELensError for parts that there are not

    def _check_routers(self) -> None:
        """Options for tuned routers need experts that are chosen with such, and one of them leaves the other no use."""
        named = self._selection(top_k=1)
        if named.score is None or not named.score.needs_tuned:
            raise MoELensError(
                f"{named} needs no tuned routers; leave --router-delta and --router-rate out, or name experts by a "
                "score of the tuned model, such as --experts ce:4"
            )
        if self.router_delta is not None and self.router_rate is not None:
            raise MoELensError(
                f"{self.router_delta} has the routers tuned; leave --router-rate out, or --router-delta to tune them"
            )

    def check_split(self, top_k: int) -> None:
        """MoELensError where routers would be tuned first, of a model that is split, which trains once."""
        if self.method in ("ceft", "esft") and self.router_delta is None:
            named = self._selection(top_k)
            if named.score is not None and named.score.needs_tuned:
                raise MoELensError(
                    f"{named} takes tuned routers, and with --shard one command trains once: tune them first, with "
                    "--method router --shard, and give their folder with --router-delta"
                )

    def check(self, lens: MoELens) -> None:
        """MoELensError for layers and experts that the model lacks, before anything is trained."""
        for layer in self.layers or ():
            lens.architecture.at(layer)
        if self.method in ("ceft", "esft"):
            self._selection(lens.architecture.top_k).check(lens.architecture)

    def told(self) -> dict[str, Any]:
        """For the provenance: what is trained; neither the rates nor the router's delta."""
        experts = None if self.experts is None else self.experts.told
        lora: dict[str, Any] = {"lora_rank": self.lora_rank, "lora_alpha": self.lora_alpha}
        lora |= {} if self.lora_on is None else {"lora_on": self.lora_on}
        own = {"positions": self.positions} if self.method == "bias" else lora
        return {"method": self.method, "experts": experts, "layers": self.layers, "seed": self.seed, **own}

    def of(self, stage: Stage, out: Path, router_rates: Sequence[float]) -> Method:
        """The method, once its experts are chosen; routers are tuned for that, at these rates, where a score asks."""
        architecture = stage.lens.architecture
        method: Method = TuneRouters(self.layers)
        if self.method == "fft":
            method = TuneAll() if self.lora_on is None else TuneParts(self.lora_on)
        elif self.method == "bias":
            method = TuneBias(self.layers, self.positions or "all")
        elif self.method != "router":
            named = self._selection(architecture.top_k)
            experts = stage.chosen(named, out, router_rates, self.router_delta, self.layers)
            method = TuneExperts(experts, name=self.method)
        return method if self.lora_rank is None else TuneLowRank(method, self.lora_rank, self.lora_alpha, self.seed)

    def _selection(self, top_k: int) -> Selection:
        """The experts that learn: those asked for, else as many context-faithful ones as a token takes, or ESFT's."""
        return self.experts or (Top(SCORES["ce"], top_k) if self.method == "ceft" else ESFT_DEFAULT)
