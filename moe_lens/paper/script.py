"""The command line of the paper's figures and tables: one figure's table computed in a study, kept, and drawn."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

import pandas as pd
import plotly.graph_objects as go
from typer import Option

from moe_lens.commands import console, options
from moe_lens.commands.options import BaseOpening, Reading
from moe_lens.commands.presets import preset_facts
from moe_lens.data.lookup import names_in
from moe_lens.errors import MoELensError
from moe_lens.lens.parallel import lead
from moe_lens.paper.published import PAPER, SOURCE, beside_paper, published_of
from moe_lens.paper.recipes import HowTuned
from moe_lens.paper.study import Study
from moe_lens.report.contents import draw
from moe_lens.report.document import View
from moe_lens.results import read_provenance, read_table, write_table
from moe_lens.storage import try_folder
from moe_lens.tuning import Schedule
from moe_lens.tuning.low_rank import check_low_rank

Compute = Callable[[Study], pd.DataFrame]

RUN = Path("runs/paper")
RATES: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "router": (3e-3, 1e-2, 3e-2, 1e-1),
        "experts": (1e-3, 3e-3, 1e-2, 3e-2),
        "all": (1e-4, 3e-4, 1e-3, 3e-3),
        "preference": (1e-4, 3e-4, 1e-3),
    }
)
"""The learning rates tried on the organism, by what learns. The paper's, for models of billions, is 5e-4."""
TRIED = "; ".join(f"{kind} {', '.join(f'{rate:g}' for rate in rates)}" for kind, rates in RATES.items())
EPOCHS = 1


@dataclass(frozen=True)
class Tuning:
    """How a script tunes.

    Raises MoELensError for values that make no sense, before anything is loaded.
    """

    learning_rate: Annotated[
        str | None, Option(help=f"Tried in every tuning, with commas; the best on dev is kept. By default {TRIED}.")
    ] = None
    epochs: options.Epochs = str(EPOCHS)
    train_batch_size: Annotated[int, Option(help="Examples per step of the tuning.")] = 16
    lora_rank: Annotated[
        int | None, Option(help="Tune routers and chosen experts as LoRA of this rank; everything is tuned whole.")
    ] = None
    lora_alpha: Annotated[
        float | None, Option(help="LoRA's product is scaled by this over its rank; default twice the rank.")
    ] = None
    score: Annotated[
        Literal["em", "f1", "log_likelihood"], Option(help="What is measured on the dev data, the best state kept.")
    ] = "em"
    evaluate_every: options.EvaluateEvery = None

    def __post_init__(self) -> None:
        if self.lora_rank is not None:
            check_low_rank(self.lora_rank, self.lora_alpha)
        elif self.lora_alpha is not None:
            raise MoELensError("--lora-alpha scales the product of --lora-rank; give that too")
        options.steps_between(self.evaluate_every)

    @property
    def how(self) -> HowTuned:
        return HowTuned(self.lora_rank, self.lora_alpha, self.score)

    def schedule(self, seed: int, tasks: Sequence[str]) -> tuple[Schedule, dict[str, int]]:
        """The schedule, with the first task's epochs, and the epochs of each task."""
        epochs = {task: options.epochs_for(self.epochs, task) for task in tasks}
        every = options.steps_between(self.evaluate_every)
        first = epochs[tasks[0]]
        return Schedule(epochs=first, batch_size=self.train_batch_size, seed=seed, evaluate_every=every), epochs


def run(
    compute: Compute,
    *,
    item: str,
    table: str,
    tasks: str,
    about: str,
    repeats: bool = False,
    columns: Sequence[str] = (),
    answer_tokens: int = 8,
    facts: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """The command line of one figure or table: computes OUT/ITEM/TABLE.parquet, unless it is there, then draws it.

    item: such as "figure5". table: the file's name, by which the report knows how to draw it. tasks: the default ones,
    with commas. about: the help text. repeats: the training is repeated with every seed; else there may be one.
    columns: to print. answer_tokens: the default of --max-new-tokens. facts: more for the provenance.
    """

    def main(
        opening: BaseOpening = BaseOpening("organism"),
        data: Annotated[str, Option(help="Tasks or data sets with train, dev and test splits, with commas.")] = tasks,
        out: Annotated[Path, Option(help="Run directory; scripts of the same one share their work.")] = RUN,
        limit: Annotated[int | None, Option(help="Use the first so many examples of each split only.")] = None,
        test_limit: Annotated[int | None, Option(min=1, help="The same of the test split alone.")] = None,
        tuning: Tuning = Tuning(),
        max_new_tokens: Annotated[int, Option(help="Longest answer, in tokens.")] = answer_tokens,
        batch_size: Annotated[int, Option(help="Examples answered at once.")] = 64,
        reading: Reading = Reading(),
        seeds: Annotated[
            str, Option(help="Of the order of examples and of random sets; with commas where all is repeated.")
        ] = "0",
        routers: Annotated[
            Path | None,
            Option(
                help="Folder with router-SEED/ of moe_lens.organism.measure, which are then the routers tuned on the "
                "first task."
            ),
        ] = None,
        preset: options.ScriptPreset = None,
        beside: Annotated[
            Literal["paper"] | None,
            Option(help="Print the table, and keep one, with the paper's value of each number and its table's number."),
        ] = None,
        draw_only: Annotated[bool, Option("--draw-only", help="Draw the saved table again; needs no model.")] = False,
    ) -> None:
        def work() -> None:
            path = out / item / f"{table}.parquet"
            if not draw_only:
                try_folder(out)
                first, *more = console.numbers(seeds, int, what="--seeds")
                if more and not repeats:
                    raise MoELensError(f"{item} shows one training; give one seed, not {seeds}")
                tasks = names_in(data)
                schedule, epochs = tuning.schedule(first, tasks)
                if beside is not None:
                    published_of(item, opening.model)  # before hours of training
                study = Study(
                    opening=opening,
                    reading=reading,
                    tasks=tasks,
                    out=out,
                    limit=limit,
                    test_limit=test_limit,
                    schedule=schedule,
                    rates=_rates(tuning.learning_rate),
                    more_seeds=tuple(more),
                    max_new_tokens=max_new_tokens,
                    batch_size=batch_size,
                    routers=routers,
                    epochs=epochs,
                    how=tuning.how,
                )
                _compute(compute, study, path, {**facts, "item": item} | preset_facts(preset, "script"))
            _show(path, item, columns)
            if beside is not None:
                _show_beside(path, item)

        lead(work)

    main.__doc__ = about
    console.run(main, shares=True)


def _rates(learning_rate: str | None) -> Mapping[str, tuple[float, ...]]:
    """The rates to try by what learns, the same for all where --learning-rate says which."""
    if learning_rate is None:
        return RATES
    return dict.fromkeys(RATES, tuple(console.rates(learning_rate, what="--learning-rate")))


def _compute(compute: Compute, study: Study, path: Path, facts: Mapping[str, object]) -> None:
    """Computes the table at `path`, unless it is there as this study makes it."""
    if not study.has(path, facts):
        computed = compute(study)
        write_table(computed, path, study.made_by(facts))  # which now knows what was read


def _show(path: Path, item: str, columns: Sequence[str]) -> None:
    """Draws the table at `path`, and prints some columns of it."""
    found = read_table(path)
    if columns:
        console.show(found, columns, title=f"{item}, rates chosen: {read_provenance(path)['rate_chosen']}")
    drawn = draw(path.name, found)
    console.say(f"{item}: {path}, {', '.join(file.name for file in save(drawn, path.with_name(f'{item}.html')))}")


def _show_beside(path: Path, item: str) -> None:
    """Prints the table at `path` with the paper's values, and keeps it beside that one."""
    made_by = read_provenance(path)
    table = beside_paper(read_table(path), item, made_by["model"], made_by["tasks"][0])
    kept = path.with_name(f"{path.stem}_beside_paper.parquet")
    write_table(table, kept, made_by)
    shown = [name for name in ("variant", "size", "task", "metric") if name in table]
    for column in table:
        if column == PAPER or str(column).endswith(f", {PAPER}"):
            shown += ["mean" if column == PAPER else str(column).removesuffix(f", {PAPER}"), str(column)]
    console.show(table, [*shown, SOURCE], title=f"{item}, beside the paper's")
    console.say(f"{item}: {kept}")


def save(drawn: go.Figure | View, path: Path) -> list[Path]:
    """Writes a figure or view as a page and, where a browser is present, as PNG and SVG beside it.

    The pictures of a view are of what it shows first.
    """
    if not isinstance(drawn, View):
        return console.save_figure(drawn, path, "png", "svg")
    still = [] if drawn.still is None else console.save_pictures(drawn.still, path, "png", "svg")
    return [drawn.save(path), *still]
