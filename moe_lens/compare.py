"""What changed between two models, or two engines, from the command line: `python -m moe_lens.compare --help`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from moe_lens.commands import console, options
from moe_lens.errors import MoELensError

COMPARED = "usage,load,margins,specialisation,saturation,divergence,matching,portraits,signatures"


@dataclass(frozen=True)
class Opening(options.BaseOpening):
    """As the other commands open a model, which the arguments name."""

    model: Annotated[
        str,
        Option(
            help="The model that a delta among the two is put on, default the one it was trained from; with --traces "
            "the one that was served."
        ),
    ] = ""


def main(
    first: Annotated[
        str,
        Argument(help="A model (organism, a folder, a hub id), or a delta that tune wrote; with --traces a trace."),
    ],
    second: Annotated[str, Argument(help="Another of these; differences are second minus first.")],
    out: Annotated[
        Path,
        Option(
            help="Folder for a table of each measure and report.html with their figures. The same command with the "
            "same folder goes on where an interrupted one stopped."
        ),
    ],
    opening: Opening = Opening(),
    data: Annotated[
        str | None,
        Option(
            help="What both are measured on, with commas for several, as the other commands' --data; with --traces the "
            "prompts that they have to be of."
        ),
    ] = None,
    traces: Annotated[
        bool, Option("--traces", help="They are traces of the same prompts, as measure --trace takes them.")
    ] = False,
    what: Annotated[
        str, Option(help="What is compared: names of moe_lens.measure --what, with commas, or all.")
    ] = COMPARED,
    positions: Annotated[str, Option(help="Which tokens count, as --positions of moe_lens.measure.")] = "all",
    split: Annotated[str, Option(help="Which split of a task or data set is read.")] = "test",
    limit: Annotated[int | None, Option(min=1, help="Take the first so many examples of each data set only.")] = None,
    reading: options.Reading = options.Reading(),
    batch_size: Annotated[int, Option(min=1, help="Examples per batch; halved where memory is too small.")] = 32,
    seed: Annotated[int, Option(min=0, help="Of the intervals of traces.")] = 0,
) -> None:
    """Say what changed between two models: which experts are used, how surely, by which tokens, and which is which.

    For example, what router tuning changed in the packaged model, and what a second training did otherwise:

    \b
        python -m moe_lens.compare organism RUN/router --data swap,novel --out RUN/changed
        python -m moe_lens.compare RUN/router RUN/ceft --data swap,novel --out RUN/apart

    Both see the same examples, so differences are paired. Experts are matched one to one by the tokens that select
    them, by router rows and by outputs. Of two engines, dtypes or quantisations of one model, by layer, by how near
    the router's choice was, and from which token on they do not agree:

    \b
        python -m moe_lens.measure --model MODEL --data DATA --what routing --out RUN/ours
        python -m moe_lens.compare --traces RUN/ours/routing.parquet served.jsonl \\
            --model MODEL --out RUN/compared
    """
    from moe_lens.commands.asked_measures import Asked
    from moe_lens.commands.compared_models import first_opened, served
    from moe_lens.commands.measured_run import MeasuredRun
    from moe_lens.commands.shards import Shard
    from moe_lens.commands.trace_runs import Traces, compare_traces
    from moe_lens.results import portable
    from moe_lens.storage import try_folder

    if traces:
        console.first_alone()
    try_folder(out)
    if traces:
        pair = [Path(first), Path(second)]
        told = Traces.opened(served(opening), pair, data, reading, split=split, limit=limit)
        compare_traces(told, opening.model, out, seed=seed)
        return
    if data is None:
        raise MoELensError("two models are compared on --data; give it")
    asked = Asked.parse(what, positions, second, [])
    run = MeasuredRun(first_opened(opening, first, second), reading, data, split, limit, batch_size, out, Shard(0, 1))
    run.leave(asked, title=f"From {portable(first)} to {portable(second)}")


if __name__ == "__main__":
    console.run(main, shares=True)
