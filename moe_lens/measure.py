"""Measuring from the command line: `python -m moe_lens.measure --help`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from moe_lens.commands import console, options
from moe_lens.errors import MoELensError

MEASURED = (
    "usage, load, spread, margins, dirichlet, histograms, coactivation, affinity, groups, paths, rates, "
    "specialisation, information, clustering, baseline, contexts, tokens, predictions, saliency, shared, similarity, "
    "vocabulary, attention, answer, saturation, divergence, matching, portraits, signatures"
)
USUAL = "usage,load,coactivation,specialisation"
"""What is measured where nobody says what."""


@dataclass(frozen=True)
class Opening(options.Opening):
    """As the other commands open a model; without one, what was kept can be joined."""

    model: Annotated[str, Option(help="'organism', 'organism:planted', a folder, or a hub id.")] = ""


def main(
    out: Annotated[
        Path,
        Option(
            help="Folder for a table of each measure and report.html with their figures. The same command with the "
            "same folder goes on where an interrupted one stopped."
        ),
    ],
    opening: Opening = Opening(),
    data: Annotated[
        str | None, Option(help="What to measure on, with commas for several, each as the other commands' --data.")
    ] = None,
    trace: options.Trace = None,
    what: Annotated[
        str,
        Option(
            help=f"With commas, of {MEASURED} (the last five with --against or --intervention; information and "
            "clustering tell several data sets of --data apart); weights, how alike the "
            "experts' weights are; routing, a row for every token, layer and selected expert with weight and logit in "
            "routing.parquet; all: everything but routing that the model and the data allow."
        ),
    ] = USUAL,
    positions: Annotated[
        str,
        Option(
            help="Which tokens count: all, prompt, context, question, from_question, last, answer, decode, or numbers "
            "counted from the prompt's last token, such as 0,1. attention and answer have places of their own."
        ),
    ] = "all",
    against: Annotated[
        str | None,
        Option(help="A delta that tune wrote, or another model: what it differs by on the same examples, in pairs."),
    ] = None,
    intervention: Annotated[
        list[str] | None,
        Option(
            help="Measure under this saved intervention too (several times), and what it changes: a folder that "
            "Intervention.save or tune --method bias wrote; FOLDER:0.5,1,2 for so many times its strength."
        ),
    ] = None,
    split: Annotated[str, Option(help="Which split of a task or data set is read.")] = "test",
    limit: Annotated[int | None, Option(min=1, help="Take the first so many examples of each data set only.")] = None,
    reading: options.Reading = options.Reading(),
    batch_size: Annotated[int, Option(min=1, help="Examples per batch; halved where memory is too small.")] = 32,
    shard: Annotated[
        str | None, Option(help="I/N: every N-th example from the I-th on, I from 0; --merge joins what N runs give.")
    ] = None,
    merge: Annotated[
        bool, Option("--merge", help="Join the folders named beside it, runs of shards, in --out.")
    ] = False,
    folders: Annotated[list[Path] | None, Argument(help="With --merge, the folders to join.")] = None,
) -> None:
    """Measure what a model's experts do on data: who is used, with whom, how surely, and to write what.

    For example, what router tuning changes, with intervals, and everything that the packaged model shows:

    \b
        python -m moe_lens.measure --model organism --data swap,novel --against RUN/router --out RUN/measured
        python -m moe_lens.measure --model organism --data swap --what all --out RUN/all

    One pass over each data set feeds all that is asked. Several processes share it: torchrun --nproc-per-node 2 -m
    moe_lens.measure … Where they cannot meet, each machine takes a shard:

    \b
        python -m moe_lens.measure --model organism --data swap --shard 0/2 --out RUN/shard-0
        python -m moe_lens.measure --model organism --data swap --shard 1/2 --out RUN/shard-1
        python -m moe_lens.measure --merge RUN/shard-0 RUN/shard-1 --out RUN/whole
    """
    from moe_lens.commands.asked_measures import Asked
    from moe_lens.commands.measured_run import MeasuredRun
    from moe_lens.commands.shards import Shard, merged
    from moe_lens.commands.trace_runs import Traces, measure_traces
    from moe_lens.storage import try_folder

    if merge or trace:
        console.first_alone()
    try_folder(out)
    if merge:
        if data or trace or against or intervention or shard or what != USUAL:
            raise MoELensError(
                "--merge joins what its folders hold, of their own data and measures; leave --data, --trace, --what, "
                "--against, --intervention and --shard out"
            )
        merged(folders or [], out, opening.load() if opening.model else None).leave()
        return
    if folders or not opening.model or not (data or trace):
        raise MoELensError("measuring takes --model and --data, and no folders; --merge FOLDER FOLDER joins such runs")
    asked = Asked.parse(what, positions, against, intervention or [])
    if trace:
        told = Traces.opened(opening, trace, data, reading, split=split, limit=limit)
        measure_traces(told, asked, opening.model, out)
        return
    run = MeasuredRun(opening, reading, data or "", split, limit, batch_size, out, Shard.parse(shard))
    run.leave(asked)


if __name__ == "__main__":
    console.run(main, shares=True)
