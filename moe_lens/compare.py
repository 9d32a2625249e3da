"""Comparing from the command line: `python -m moe_lens.compare --help`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from moe_lens.commands import console, options
from moe_lens.errors import MoELensError


def main(
    pair: Annotated[list[Path], Argument(help="The two that are compared.")],
    opening: options.Opening,
    out: Annotated[Path, Option(help="Folder for the tables and report.html with their figures.")],
    traces: Annotated[
        bool, Option("--traces", help="They are traces of the same prompts, as measure --trace takes them.")
    ] = False,
    data: Annotated[str | None, Option(help="The prompts that the traces have to be of.")] = None,
    split: Annotated[str, Option(help="Which split of a task or data set the prompts are.")] = "test",
    limit: Annotated[int | None, Option(min=1, help="The first so many prompts only.")] = None,
    reading: options.Reading = options.Reading(),
    seed: Annotated[int, Option(min=0, help="Of the intervals.")] = 0,
) -> None:
    """Say how far two traces of the same prompts agree: two engines, dtypes or quantisations of one model.

    By layer, by how near the router's choice was, and from which token on they do not:

    \b
        python -m moe_lens.measure --model MODEL --data DATA --what routing --out RUN/ours
        python -m moe_lens.compare --traces RUN/ours/routing.parquet served.jsonl \\
            --model MODEL --out RUN/compared
    """
    from moe_lens.commands.trace_runs import Traces, compare_traces
    from moe_lens.storage import try_folder

    try_folder(out)
    if not traces or len(pair) != 2:
        raise MoELensError(f"two traces are compared: --traces A B; got {len(pair)}")
    opened = Traces.opened(opening, pair, data, reading, split=split, limit=limit)
    compare_traces(opened, opening.model, out, seed=seed)


if __name__ == "__main__":
    console.run(main)
