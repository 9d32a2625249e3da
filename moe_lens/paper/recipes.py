"""Recipes: what the analyses train, by name (which experts, the routers of which layers), and how a run keeps it."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moe_lens.choosing.measuring import Models, score_tables
from moe_lens.choosing.selection import Ground, Selection, choices
from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.lens.delta import read_facts, stored_parameters
from moe_lens.lens.lens import MoELens
from moe_lens.lens.parallel import done_by_first
from moe_lens.results import write_table
from moe_lens.storage import read_sealed_json, write_sealed_json
from moe_lens.tuning import (
    DPO,
    Method,
    Schedule,
    TuneAll,
    TuneExperts,
    TuneLowRank,
    TuneParts,
    TuneRouters,
    save_trained,
    tune,
)
from moe_lens.tuning.processes import Processes
from moe_lens.tuning.training import DevMetric

KINDS = ("router", "experts", "all", "preference")
COST_FILE = "cost.json"
LORA = 64
"""Context-DPO's rank and alpha."""


@dataclass(frozen=True)
class Recipe:
    """One way to tune a model.

    name: the variant's in tables, such as "CEFT". kind: what learns: "router", "experts", "all", or "preference", which
        is Context-DPO as published, by LoRA on attention and MLPs.
    layers: whose routers learn, None for all. experts: which learn. rate: the learning rate, None for the best on dev.
    """

    name: str
    kind: str
    layers: tuple[int, ...] | None = None
    experts: Selection | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise MoELensError(f"a recipe's kind is one of {', '.join(KINDS)}; got {self.kind!r}")
        if (self.experts is not None) != (self.kind == "experts"):
            raise MoELensError(f"a recipe names experts if they are what learns; got {self}")
        if self.layers is not None and self.kind != "router":
            raise MoELensError(f"a recipe names layers if their routers are what learns; got {self}")

    @property
    def folder(self) -> str:
        """A name that tells it from all others, fit for a folder."""
        layers = "" if self.layers is None else "-layers-" + "+".join(map(str, self.layers))
        experts = "" if self.experts is None else "-" + self.experts.name.replace(":", "-").replace("=", "")
        return self.kind + layers + experts + ("" if self.rate is None else f"-rate-{self.rate:g}")

    @property
    def needs_router(self) -> bool:
        """Whether its experts are chosen with tuned routers."""
        score = None if self.experts is None else self.experts.score
        return score is not None and score.needs_tuned

    def method(self, lens: MoELens, train: Sequence[Example], *, model: str, seed: int, router: Path | None) -> Method:
        """What `tune` takes. model: the lens's name, to look up planted experts. seed: of random experts.

        router: the folder of tuned routers, where they are needed to choose its experts on `train`.
        """
        if self.kind == "router":
            return TuneRouters(self.layers)
        if self.kind == "preference":
            return TuneLowRank(TuneParts(), rank=LORA, alpha=LORA, seed=seed)
        if self.experts is None:
            return TuneAll()

        self.experts.check(lens.architecture)
        tables = {}
        if self.experts.score is not None:
            if self.needs_router and router is None:
                raise MoELensError(f"{self.experts} ranks experts in a router-tuned model; give its routers")
            models = Models.opened(lens, lens) if router is None else Models.with_delta(lens, router)
            tables = score_tables([self.experts.score], models, train)
        [choice] = choices([self.experts], Ground(lens.architecture, model, tables, seed=seed))
        return TuneExperts(choice.experts, name=self.folder)


ROUTER = Recipe("router-tuned", "router")
FFT = Recipe("FFT", "all")
CONTEXT_DPO = Recipe("Context-DPO", "preference")


@dataclass(frozen=True)
class HowTuned:
    """How what learns is tuned: as LoRA of a rank (routers and experts), and by which dev score a state is kept."""

    lora_rank: int | None = None
    lora_alpha: float | None = None
    score: DevMetric = "em"

    def method(self, method: Method, seed: int) -> Method:
        """The method, as LoRA where that is asked and it is neither that nor full fine-tuning."""
        if self.lora_rank is None or isinstance(method, TuneAll | TuneLowRank):
            return method
        return TuneLowRank(method, self.lora_rank, self.lora_alpha, seed)

    def facts(self) -> dict[str, Any]:
        """For provenance: what is not as it is by default."""
        return {name: value for name, value in asdict(self).items() if value != getattr(HowTuned, name)}


def experts(name: str, selection: Selection) -> Recipe:
    """The recipe that trains the experts of a selection."""
    return Recipe(name, "experts", experts=selection)


def router_of(layers: Sequence[int]) -> Recipe:
    """Router tuning of these layers only."""
    return Recipe(ROUTER.name, "router", layers=tuple(layers))


@dataclass(frozen=True)
class Cost:
    """What a training took.

    learning_rate: that was best on dev. trainable: parameters. seconds: of one training at one rate, with that of the
    routers by which its experts were chosen, where that is known.
    """

    learning_rate: float
    trainable: int
    seconds: float


def read_cost(folder: Path) -> Cost:
    """What the training of a folder that `Study.trained` gave took; its seconds are NaN where nobody took the time."""
    if not (folder / COST_FILE).exists():
        return Cost(read_facts(folder)["learning_rate"], stored_parameters(folder), math.nan)
    return Cost(**read_sealed_json(folder / COST_FILE, remedy=f"remove {folder} to train anew"))


def keep_trained(
    recipe: Recipe,
    lens: MoELens,
    train: Sequence[Example],
    dev: Sequence[Example],
    folder: Path,
    *,
    model: str,
    router: Path | None,
    schedule: Schedule,
    rates: Sequence[float],
    max_length: int,
    max_new_tokens: int,
    how: HowTuned,
    made_by: dict[str, Any],
) -> None:
    """Train a lens and keep it in `folder`, going on where an interrupted call with the same folder stopped.

    It is a delta checkpoint with the provenance `made_by`, beside log.parquet, learning_rates.parquet (each tried with
    its score on dev) and cost.json (`Cost`). router: the folder of tuned routers, where the recipe needs them.
    """
    chosen = done_by_first(lambda: recipe.method(lens, train, model=model, seed=schedule.seed, router=router))
    method = how.method(chosen, schedule.seed)
    schedule = replace(schedule, learning_rate=rates[0])
    tuned = tune(
        lens,
        train,
        dev,
        method,
        schedule,
        objective=DPO() if recipe.kind == "preference" else None,
        learning_rates=rates,
        out=folder,
        score=how.score,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
    )
    if not Processes.current().is_main:
        return
    of_router = 0.0 if router is None else read_cost(router).seconds
    seconds = tuned.seconds / len(rates) + (0.0 if math.isnan(of_router) else of_router)
    write_table(tuned.log, folder / "log.parquet", made_by)
    write_table(tuned.candidates, folder / "learning_rates.parquet", made_by)
    write_sealed_json(folder / COST_FILE, asdict(Cost(tuned.schedule.learning_rate, tuned.trained.count, seconds)))
    save_trained(lens.module, tuned.trained, folder, facts=method.facts() | made_by)
    shutil.rmtree(folder / "training")  # what an interrupted training would have gone on from
