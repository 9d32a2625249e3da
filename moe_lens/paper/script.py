"""The command line of the paper's figures and tables: one figure's table computed in a study, kept, and drawn."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import pandas as pd
import plotly.graph_objects as go
from typer import Option

from moe_lens.commands import console
from moe_lens.commands.options import BaseOpening, Reading
from moe_lens.errors import MoELensError
from moe_lens.paper.study import Study
from moe_lens.report.contents import draw
from moe_lens.report.document import View
from moe_lens.results import read_provenance, read_table, write_table
from moe_lens.storage import try_folder
from moe_lens.tuning import Schedule

Compute = Callable[[Study], pd.DataFrame]

RUN = Path("runs/paper")
RATES: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "router": (3e-3, 1e-2, 3e-2, 1e-1),
        "experts": (1e-3, 3e-3, 1e-2, 3e-2),
        "all": (1e-4, 3e-4, 1e-3, 3e-3),
    }
)
"""The learning rates tried on the organism, by what learns. The paper's, for models of billions, is 5e-4."""
TRIED = "; ".join(f"{kind} {', '.join(f'{rate:g}' for rate in rates)}" for kind, rates in RATES.items())
EPOCHS = 1


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
        learning_rate: Annotated[
            str | None,
            Option(help=f"Tried in every tuning, with commas; the best on dev is kept. By default {TRIED}."),
        ] = None,
        epochs: Annotated[int, Option(help="Passes over the training data.")] = EPOCHS,
        train_batch_size: Annotated[int, Option(help="Examples per step of the tuning.")] = 16,
        max_new_tokens: Annotated[int, Option(help="Longest answer, in tokens.")] = answer_tokens,
        batch_size: Annotated[int, Option(help="Examples answered at once.")] = 64,
        reading: Reading = Reading(),
        seeds: Annotated[
            str, Option(help="Of the order of examples and of random sets; with commas where all is repeated.")
        ] = "0",
        draw_only: Annotated[bool, Option("--draw-only", help="Draw the saved table again; needs no model.")] = False,
    ) -> None:
        path = out / item / f"{table}.parquet"
        if not draw_only:
            try_folder(out)
            first, *more = console.numbers(seeds, int, what="--seeds")
            if more and not repeats:
                raise MoELensError(f"{item} shows one training; give one seed, not {seeds}")
            schedule = Schedule(epochs=epochs, batch_size=train_batch_size, seed=first)
            study = Study(
                opening=opening,
                reading=reading,
                tasks=tuple(data.split(",")),
                out=out,
                limit=limit,
                test_limit=test_limit,
                schedule=schedule,
                rates=_rates(learning_rate),
                more_seeds=tuple(more),
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
            )
            _compute(compute, study, path, {**facts, "item": item})
        _show(path, item, columns)

    main.__doc__ = about
    console.run(main)


def _rates(learning_rate: str | None) -> Mapping[str, tuple[float, ...]]:
    """The rates to try by what learns, the same for all where --learning-rate says which."""
    if learning_rate is None:
        return RATES
    return dict.fromkeys(RATES, tuple(console.numbers(learning_rate, float, what="--learning-rate")))


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


def save(drawn: go.Figure | View, path: Path) -> list[Path]:
    """Writes a figure or view as a page and, where a browser is present, as PNG and SVG beside it.

    The pictures of a view are of what it shows first.
    """
    if not isinstance(drawn, View):
        return [*console.save_figure(drawn, path), *console.save_pictures(drawn, path, "svg")]
    still = [] if drawn.still is None else console.save_pictures(drawn.still, path, "png", "svg")
    return [drawn.save(path), *still]
