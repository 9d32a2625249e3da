"""What the scripts of the paper's figures share: their options, and tuned routers and answers kept in one run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import pandas as pd
import plotly.graph_objects as go
from typer import Option

from moe_lens import console
from moe_lens.data import Example, load_examples
from moe_lens.delta import FACTS_FILE, read_facts, weights_digest
from moe_lens.errors import MoELensError
from moe_lens.evaluation import answer_table, summarise
from moe_lens.lens import MoELens
from moe_lens.results import provenance, read_if_made_by, read_table, write_bytes, write_table
from moe_lens.statistics import AttentionMass
from moe_lens.tuning import Schedule, save_trained, tune_router
from moe_lens.views import View

SINGLE_FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gz")
DEV_EXAMPLES = 100
RUN = Path("runs/paper")


@dataclass(frozen=True)
class Study:
    """One model on some tasks, in a run directory where tuned routers and answers are kept for the next script.

    tasks: names for `load_examples`, each with train, dev and test splits. limit: examples of every split, None for
    all. schedule: of the tuning; rates: tried with it, the best on dev is kept.
    """

    model: str
    tasks: tuple[str, ...]
    out: Path
    limit: int | None
    schedule: Schedule
    rates: tuple[float, ...]
    max_new_tokens: int
    batch_size: int
    dtype: str | None
    device: str | None

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task.endswith(SINGLE_FILES) and ":" not in task:
                raise MoELensError(f"{task} has no splits; give a folder that has train, dev and test files")

    def open(self, router: Path | None = None) -> MoELens:
        """The model, with the tuned routers of a folder that `router` gave."""
        return MoELens.from_pretrained(
            self.model, dtype=console.dtype_named(self.dtype), device_map=self.device, delta=router
        )

    def examples(self, task: str, split: str = "test") -> list[Example]:
        """A task's first `limit` examples."""
        return load_examples(task, split=split, limit=self.limit)

    @cached_property
    def weights(self) -> str:
        """What tells this model's weights from others of the same name."""
        return weights_digest(self.open().module)

    def made_by(self, examples: Sequence[Example] | None = None, *, delta: Path | None = None, **facts: object) -> dict:
        """Provenance of a result on these examples."""
        facts |= {"tasks": list(self.tasks), "limit": self.limit, "weights": self.weights, "rates": list(self.rates)}
        facts |= {"epochs": self.schedule.epochs, "train_batch_size": self.schedule.batch_size, "dtype": self.dtype}
        facts["max_new_tokens"] = self.max_new_tokens
        return provenance(model=self.model, delta=delta, data=examples, seed=self.schedule.seed, facts=facts)

    def router(self, task: str, layers: Sequence[int] | None = None) -> Path:
        """The folder of routers tuned on a task (of some layers only), tuned now unless the run has them already."""
        which = "" if layers is None else "-layers-" + "+".join(map(str, layers))
        folder = self.out / "routers" / f"{Path(task).name}{which}-{self.schedule.seed}"
        train = self.examples(task, "train")
        made_by = self.made_by(train, layers=None if layers is None else list(layers)) | {"tasks": [task]}
        if (folder / FACTS_FILE).exists():
            kept = read_facts(folder)
            if all(kept.get(name) == value for name, value in made_by.items() if name != "command"):
                return folder
        lens = self.open()
        dev = self.examples(task, "dev")[:DEV_EXAMPLES]
        tuned = tune_router(
            lens,
            train,
            dev,
            self.schedule,
            learning_rates=self.rates,
            layers=layers,
            max_new_tokens=self.max_new_tokens,
        )
        write_table(tuned.log, folder / "tuning.parquet", made_by)
        save_trained(lens.module, tuned.trained, folder, facts=made_by)
        return folder

    def answers(self, task: str, router: Path | None = None) -> pd.DataFrame:
        """`answer_table` of a task's test examples, by the base model or with tuned routers; kept in the run."""
        examples = self.examples(task)
        name = "base" if router is None else router.name
        part = self.out / "answers" / f"{Path(task).name}-{name}.parquet"
        made_by = self.made_by(examples, delta=router) | {"tasks": [task]}
        kept = read_if_made_by(part, made_by)
        if kept is None:
            kept = answer_table(
                self.open(router), examples, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size
            )
            write_table(kept, part, made_by)
        return kept

    def attention_mass(self, task: str, router: Path | None = None) -> pd.DataFrame:
        """`AttentionMass` of a task's test examples, in the base model or with tuned routers; kept in the run."""
        examples = self.examples(task)
        part = self.out / "attention" / f"{Path(task).name}-{'base' if router is None else router.name}.parquet"
        made_by = self.made_by(examples, delta=router) | {"tasks": [task]}
        kept = read_if_made_by(part, made_by)
        if kept is None:
            [mass] = self.open(router).measure(examples, AttentionMass(), batch_size=self.batch_size)
            kept = mass.table()
            write_table(kept, part, made_by)
        return kept

    def first_layers(self, task: str) -> dict[str, Path]:
        """Routers tuned in the first layer, the first two, … and all: "first 1" and so on, to their folders."""
        layers = self.open().architecture.moe_layers
        some = {f"first {n}": self.router(task, layers[:n]) for n in range(1, len(layers))}
        return some | {f"all {len(layers)}": self.router(task)}

    def answer_row(self, variant: str, task: str, router: Path | None = None) -> dict:
        """variant, task and `summarise` of the answers: EM with its interval, F1, answers from memory."""
        return {"variant": variant, "task": task, "seed": self.schedule.seed, **summarise(self.answers(task, router))}


Compute = Callable[[Study], pd.DataFrame]
Draw = Callable[[pd.DataFrame], go.Figure | View]


def run(compute: Compute, draw: Draw, *, item: str, table: str, tasks: str, about: str) -> None:
    """The command line of one figure or table: computes OUT/ITEM/TABLE.parquet, unless it is there, then draws it.

    item: such as "figure5". table: the file's name, by which the report knows it. tasks: the default ones, with commas.
    about: the help text.
    """

    def main(
        model: Annotated[str, Option(help="organism, organism:planted, a folder, or a hub id.")] = "organism",
        data: Annotated[str, Option(help="Tasks or data sets with train, dev and test splits, with commas.")] = tasks,
        out: Annotated[Path, Option(help="Run directory; scripts of the same one share their work.")] = RUN,
        limit: Annotated[int | None, Option(help="Use the first so many examples of each split only.")] = None,
        learning_rate: Annotated[
            str, Option(help="Of the tuning; of several with commas the best on dev. The paper's is 5e-4.")
        ] = "2e-2",
        epochs: Annotated[int, Option(help="Passes over the training data.")] = 2,
        train_batch_size: Annotated[int, Option(help="Examples per step of the tuning.")] = 16,
        max_new_tokens: Annotated[int, Option(help="Longest answer, in tokens.")] = 8,
        batch_size: Annotated[int, Option(help="Examples answered at once.")] = 64,
        dtype: Annotated[str | None, Option(help="float32, bfloat16 or float16.")] = None,
        device: Annotated[str | None, Option(help="As transformers' device_map.")] = None,
        seed: Annotated[int, Option(help="Of the tuning's order of examples and of random sets.")] = 0,
        draw_only: Annotated[bool, Option("--draw-only", help="Draw the saved table again; needs no model.")] = False,
    ) -> None:
        path = out / item / f"{table}.parquet"
        if not draw_only:
            rates = tuple(console.numbers(learning_rate, float, what="--learning-rate"))
            schedule = Schedule(learning_rate=rates[0], epochs=epochs, batch_size=train_batch_size, seed=seed)
            study = Study(
                model, tuple(data.split(",")), out, limit, schedule, rates, max_new_tokens, batch_size, dtype, device
            )
            made_by = study.made_by(item=item)
            if read_if_made_by(path, made_by) is None:
                write_table(compute(study), path, made_by)
        drawn = draw(read_table(path))
        print(f"{item}: {path}, {', '.join(file.name for file in save(drawn, path.with_name(f'{item}.html')))}")

    main.__doc__ = about
    console.run(main)


def save(drawn: go.Figure | View, path: Path) -> list[Path]:
    """Writes a figure as a page and, where a browser is present, as PNG and SVG beside it; a view as a page."""
    if isinstance(drawn, View):
        return [drawn.save(path)]
    files = console.save_figure(drawn, path)
    if len(files) > 1:
        files.append(path.with_suffix(".svg"))
        write_bytes(files[-1], drawn.to_image(format="svg"))
    return files
