"""Study: one model on some tasks, its tuned models and answers kept in a run that the paper's figures share."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedTokenizerBase

from moe_lens.architecture import MoEArchitecture
from moe_lens.causal.evaluation import answer_table, summarise
from moe_lens.commands.options import BaseOpening, Reading
from moe_lens.data import Example, PromptTemplate, encode
from moe_lens.data.files import ending
from moe_lens.errors import MoELensError
from moe_lens.lens.delta import FACTS_FILE, read_facts
from moe_lens.lens.lens import MoELens
from moe_lens.lens.parallel import WHOLE, connected, gathered, is_alone, part_of_work, sharing, together
from moe_lens.metrics.catalogue import DEFAULT_METRICS
from moe_lens.paper.recipes import ROUTER, HowTuned, Recipe, keep_trained, read_cost, router_of
from moe_lens.results import data_digest, expect_same_run, kept, provenance, read_if_made_by, read_provenance
from moe_lens.statistics import AnswerProbability, AttentionMass
from moe_lens.tuning import Schedule
from moe_lens.tuning.training import MAX_LENGTH

DEV_EXAMPLES = 100
BY = {"em": "exact match", "f1": "F1", "log_likelihood": "log-likelihood"}


@dataclass(frozen=True)
class _Base:
    """What a study knows of the model before tuning. facts: for provenance."""

    architecture: MoEArchitecture
    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate
    facts: dict[str, Any]


@dataclass(frozen=True)
class Study:
    """One model on some tasks, in a run directory where tuned models and answers are kept for the next script.

    What is kept is used again only where all of its provenance is the same, exact package versions included: after an
    upgrade everything is computed anew.

    opening, reading: how the model is opened and the data are read. tasks: names for `load_examples`, each with train,
    dev and test splits. limit: examples of every split, None for all; test_limit: of the test split if that is fewer.
    schedule: of every tuning; its seed is that of scripts that
    show one training, and of what is drawn at random. rates: by what learns (`Recipe.kind`), tried with that seed; the
    best on dev is kept, for the other seeds too. more_seeds: of scripts that repeat the training.
    routers: a folder with router-SEED/, of moe_lens.organism.measure, whose routers stand for those that would be tuned
    on the first task.
    epochs: of the tasks that are trained on for others than the schedule's. how: what learns is tuned.
    """

    opening: BaseOpening
    reading: Reading
    tasks: tuple[str, ...]
    out: Path
    limit: int | None
    test_limit: int | None
    schedule: Schedule
    rates: Mapping[str, tuple[float, ...]]
    more_seeds: tuple[int, ...]
    max_new_tokens: int
    batch_size: int
    routers: Path | None = None
    epochs: Mapping[str, int] = field(default_factory=dict)
    how: HowTuned = HowTuned()

    def __post_init__(self) -> None:
        for task in self.tasks:
            if ending(task) is not None and ":" not in task:
                raise MoELensError(f"{task} has no splits; give a folder that has train, dev and test files")

    @property
    def seeds(self) -> tuple[int, ...]:
        """All of them, the one that chooses the rates first."""
        return (self.schedule.seed, *self.more_seeds)

    @property
    def model(self) -> str:
        """Its name, as it was given."""
        return self.opening.model

    def open(self, tuned: Path | None = None) -> MoELens:
        """The model, as tuned in a folder that `trained` gave; of several processes on each one's own device."""
        lens = self.opening.load(delta=tuned)
        if not is_alone() and self.opening.device is None:
            lens.module.to(connected().device)
        lens.batch_size = self.batch_size
        return lens

    def examples(self, task: str, split: str = "test") -> list[Example]:
        """A task's first examples, as many as the limits let in and as fit; of dev no more than `DEV_EXAMPLES`."""
        return self._read(task, split)[0]

    def _read(self, task: str, split: str) -> tuple[list[Example], dict[str, Any]]:
        """The examples with their `data_digest`, read once."""
        if (task, split) not in self._data:
            at_most = {"dev": DEV_EXAMPLES, "test": self.test_limit}.get(split)
            found = self.reading.load(task, split=split, limit=self.limit)[:at_most]
            if self.reading.max_length is not None:
                found = list(self.reading.fit(found, self._base, of=f"{task}, {split}").examples)
            self._data[task, split] = found, data_digest(found)
        return self._data[task, split]

    @cached_property
    def _data(self) -> dict[tuple[str, str], tuple[list[Example], dict[str, Any]]]:
        """What was read so far, by task and split."""
        return {}

    @property
    def architecture(self) -> MoEArchitecture:
        """The model's."""
        return self._base.architecture

    @cached_property
    def _base(self) -> _Base:
        """What is known of the base model; the model itself is not kept in memory."""
        lens = self.open()
        return _Base(lens.architecture, lens.tokenizer, lens.template, self.opening.facts(lens))

    def made_by(self, facts: Mapping[str, object], *, delta: Path | None = None) -> dict[str, Any]:
        """Provenance of a table of this study, with all examples that were read so far."""
        data: dict[str, dict[str, Any]] = {}
        for (task, split), (_, digest) in self._data.items():
            data.setdefault(task, {})[split] = digest
        told = {
            **facts,
            "tasks": list(self.tasks),
            "limit": self.limit,
            "test_limit": self.test_limit,
            "seeds": list(self.seeds),
            "rates": {kind: list(rates) for kind, rates in self.rates.items()},
            "rate_chosen": f"best {BY[self.how.score]} on dev with seed {self.schedule.seed}, used with every seed",
            "data": data,
        }
        if len(set(self.epochs.values())) > 1:
            told["epochs_of"] = dict(self.epochs)
        return provenance(model=self.model, delta=delta, facts=told | self._settings())

    def has(self, path: Path, facts: Mapping[str, object]) -> bool:
        """Whether a table is there; MoELensError for one with other facts, or if its examples are not the same now."""
        if not path.exists():
            return False
        for task, splits in (read_provenance(path)["data"] or {}).items():
            for split in splits if task in self.tasks else ():
                self._read(task, split)
        return read_if_made_by(path, self.made_by(facts)) is not None

    def _settings(self) -> dict[str, Any]:
        facts = self._base.facts | {"max_new_tokens": self.max_new_tokens}
        facts |= {"max_length": self.reading.max_length, "too_long": self.reading.too_long}
        facts |= {"epochs": self.schedule.epochs, "train_batch_size": self.schedule.batch_size} | self.how.facts()
        every = self.schedule.evaluate_every
        return facts if every is None else facts | {"evaluate_every": every}

    def epochs_of(self, task: str) -> int:
        """How often a training on this task passes over its examples."""
        return self.epochs.get(task, self.schedule.epochs)

    def measured_by(self, task: str, tuned: Path | None, *, split: str = "test") -> dict[str, Any]:
        """Provenance of what a model does on a task's examples, whatever the study."""
        facts = self._base.facts | {"task": task, "max_new_tokens": self.max_new_tokens, "metrics": DEFAULT_METRICS}
        return provenance(model=self.model, delta=tuned, facts=facts | {"data": self._read(task, split)[1]})

    def router(self, task: str, layers: Sequence[int] | None = None) -> Path:
        """The folder of routers tuned on a task (of some layers only) with the first seed; see `trained`."""
        return self.trained(task, ROUTER if layers is None else router_of(layers))

    def trained(self, task: str, recipe: Recipe, seed: int | None = None) -> Path:
        """The folder of a model tuned on a task, tuned now unless the run has it already.

        What is in it, `keep_trained` says. The rate is the best on dev with the first seed; routers of some layers only
        take the one that was best for all layers. seed: one of the study's, by default the first.
        """
        seed = self.schedule.seed if seed is None else seed
        if self.routers is not None and recipe == ROUTER and task == self.tasks[0]:
            return self._ready(self.routers / f"router-{seed}", task)
        folder = self.out / "trained" / f"{file_name(task)}-{recipe.folder}-{seed}"
        router = self.trained(task, ROUTER, seed) if recipe.needs_router else None
        rates = self.rates[recipe.kind]
        if recipe.rate is not None:
            chosen = self.trained(task, replace(recipe, rate=None), seed)
            if read_cost(chosen).learning_rate == recipe.rate:
                return chosen
            rates = (recipe.rate,)
        elif recipe.layers is not None or seed != self.schedule.seed:
            chosen = self.trained(task, recipe if recipe.layers is None else ROUTER)
            rates = (read_cost(chosen).learning_rate,)
        made_by = self._trained_by(task, recipe, rates, router, seed)
        if not _holds(folder, made_by):
            examples = self.examples(task, "train"), self.examples(task, "dev")
            together(_train, replace(self), task, recipe, seed, folder, router, rates, made_by, *examples)
        return folder

    def _ready(self, folder: Path, task: str) -> Path:
        """A folder with routers that were tuned elsewhere; MoELensError unless it was on these examples of the task."""
        if not (folder / FACTS_FILE).exists():
            raise MoELensError(f"there are no tuned routers in {folder}; make them, or leave --routers out")
        if read_facts(folder).get("data") != self._read(task, "train")[1]:
            raise MoELensError(
                f"the routers in {folder} were tuned on other examples than the training examples of {task} that this "
                "run reads; give it the same --data and --limit, or leave --routers out"
            )
        return folder

    def _trained_by(
        self, task: str, recipe: Recipe, rates: Sequence[float], router: Path | None, seed: int
    ) -> dict[str, Any]:
        """Provenance of a training. router: of the routers by which the experts are chosen."""
        chosen_by = None if router is None else provenance(model=self.model, delta=router)["delta"]
        train, dev = (self._read(task, split)[1] for split in ("train", "dev"))
        experts = None if recipe.experts is None else recipe.experts.told
        facts = {"task": task, "rates": list(rates), "chosen": experts, "routers": chosen_by, "data": train, "dev": dev}
        settings = self._settings() | {"epochs": self.epochs_of(task)}
        return provenance(model=self.model, seed=seed, facts=facts | settings)

    def answers(self, task: str, tuned: Path | None = None) -> pd.DataFrame:
        """`answer_table` of a task's test examples, by the base model or a tuned one; kept in the run."""
        part = self.out / "answers" / f"{file_name(task)}-by-{'base' if tuned is None else tuned.name}.parquet"
        examples = self.examples(task)
        return kept(part, self.measured_by(task, tuned), lambda: together(_answer, replace(self), examples, tuned))

    def attention_mass(self, task: str, router: Path | None = None) -> pd.DataFrame:
        """`AttentionMass` of a task's test examples, in the base model or with tuned routers; kept in the run."""
        part = self.out / "attention" / f"{file_name(task)}-{'base' if router is None else router.name}.parquet"
        examples = self.examples(task)
        return kept(part, self.measured_by(task, router), lambda: together(_attend, replace(self), examples, router))

    def answer_probabilities(self, task: str, router: Path | None = None) -> pd.DataFrame:
        """`AnswerProbability` of a task's test examples, in the base model or with tuned routers; kept in the run.

        Of the residual stream after each layer, normed as before the head.
        """
        part = self.out / "probabilities" / f"{file_name(task)}-{'base' if router is None else router.name}.parquet"
        examples = self.examples(task)
        return kept(
            part, self.measured_by(task, router), lambda: together(_probabilities, replace(self), examples, router)
        )

    def first_layers(self, task: str) -> dict[str, Path]:
        """Routers tuned in the first layer, the first two, … and all: "first 1" and so on, to their folders."""
        layers = self.architecture.moe_layers
        some = {f"first {n}": self.router(task, layers[:n]) for n in range(1, len(layers))}
        return some | {f"all {len(layers)}": self.router(task)}

    def answer_row(self, variant: str, task: str, tuned: Path | None = None, seed: int | None = None) -> dict[str, Any]:
        """variant, task, seed and `summarise` of the answers: EM with its interval, F1, answers from memory.

        Of a tuned model also its `Cost`.
        """
        row = {"variant": variant, "task": task, "seed": self.schedule.seed if seed is None else seed}
        cost = {} if tuned is None else asdict(read_cost(tuned))
        return row | summarise(self.answers(task, tuned)) | cost


def _train(
    study: Study,
    task: str,
    recipe: Recipe,
    seed: int,
    folder: Path,
    router: Path | None,
    rates: Sequence[float],
    made_by: dict[str, Any],
    train: Sequence[Example],
    dev: Sequence[Example],
) -> None:
    """`keep_trained` as the study has it."""
    keep_trained(
        recipe,
        study.open(),
        train,
        dev,
        folder,
        model=study.model,
        router=router,
        schedule=replace(study.schedule, seed=seed, epochs=study.epochs_of(task)),
        rates=rates,
        max_length=MAX_LENGTH if study.reading.max_length is None else study.reading.max_length,
        max_new_tokens=study.max_new_tokens,
        how=study.how,
        made_by=made_by,
    )


def _answer(study: Study, examples: Sequence[Example], tuned: Path | None) -> pd.DataFrame:
    """`answer_table` of examples, the longest first in batches, of which each process answers some."""
    lens = study.open(tuned)
    part = part_of_work(lens.module)
    if part == WHOLE:
        return answer_table(lens, examples, max_new_tokens=study.max_new_tokens)
    lengths = [len(encode(example, lens.tokenizer, template=lens.template).input_ids) for example in examples]
    longest_first = sorted(range(len(examples)), key=lengths.__getitem__, reverse=True)
    batches = [longest_first[start : start + study.batch_size] for start in range(0, len(examples), study.batch_size)]
    own = [place for batch in batches[part[0] :: part[1]] for place in batch]

    def answered() -> Iterator[pd.DataFrame]:
        if own:
            asked = [examples[place] for place in own]
            yield answer_table(lens, asked, max_new_tokens=study.max_new_tokens).set_index(pd.Index(own))

    return pd.concat(gathered(answered(), part)).sort_index()


def _attend(study: Study, examples: Sequence[Example], router: Path | None) -> pd.DataFrame:
    """`AttentionMass` of examples; each process measures some of the batches."""
    with sharing():
        [mass] = study.open(router).measure(examples, AttentionMass())
    return mass.table()


def _probabilities(study: Study, examples: Sequence[Example], router: Path | None) -> pd.DataFrame:
    """`AnswerProbability` of examples; each process measures some of the batches."""
    lens = study.open(router)
    with sharing():
        [probability] = lens.measure(examples, AnswerProbability(lens.project_on_vocab))
    return probability.table()


def file_name(task: str) -> str:
    """What a task's files are called: its last part, with a hash of the whole where that is not all of it."""
    last = Path(task).name
    return last if last == task else f"{last}-{hashlib.sha256(task.encode()).hexdigest()[:8]}"


def _holds(folder: Path, made_by: dict[str, Any]) -> bool:
    """Whether a delta checkpoint is in the folder; MoELensError for one that was made otherwise."""
    if not (folder / FACTS_FILE).exists():
        return False
    facts = read_facts(folder)
    expect_same_run(folder, {name: facts.get(name) for name in made_by}, made_by)
    return True
