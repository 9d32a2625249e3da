"""The atlas of a model's experts from the command line: `python -m moe_lens.atlas --help`."""

from pathlib import Path
from typing import Annotated

from typer import Option

from moe_lens.commands import console, options
from moe_lens.errors import MoELensError


def main(
    opening: options.Opening,
    out: Annotated[
        Path,
        Option(
            help="Folder for index.html, which opens from the disk, atlas/ with its data, and tables/ with numbers. "
            "The same command with the same folder reads the tables and makes the pages anew."
        ),
    ],
    data: Annotated[
        str | None,
        Option(
            help="What the experts are watched on, with commas: each data set is a domain of the atlas. Names as "
            "--data of the other commands takes them."
        ),
    ] = None,
    trace: options.Trace = None,
    scores: Annotated[
        list[Path] | None,
        Option(
            help="The folder of a run (several times) whose numbers about single experts are shown: scores that "
            "moe_lens.find, intervene or evaluate kept there, single effects among them, and dose curves."
        ),
    ] = None,
    positions: Annotated[
        str,
        Option(
            help="Which tokens count: all (of the prompt), context, question, from_question, last, or numbers counted "
            "from the prompt's last token, such as -1,0."
        ),
    ] = "all",
    contexts: Annotated[int, Option(min=1, help="Contexts shown of each expert and data set.")] = 6,
    split: Annotated[str, Option(help="Which split of each data set is read (a file has none: all of it).")] = "test",
    limit: Annotated[int | None, Option(min=1, help="Read the first so many examples of each data set only.")] = None,
    reading: options.Reading = options.Reading(),
    judge: Annotated[
        str | None,
        Option(
            help="The address of a server that speaks the OpenAI chat protocol, such as http://localhost:8000/v1: the "
            "model there gives each expert a label, from the places of its most weight. Its key is OPENAI_API_KEY."
        ),
    ] = None,
    judge_model: Annotated[str | None, Option(help="The name of the model on that server.")] = None,
    batch_size: Annotated[
        int, Option(min=1, help="Examples per batch; the outputs of all their experts are in memory at once.")
    ] = 8,
) -> None:
    """Write a site with a page for every expert of a model: what takes it, what it writes, and who goes with it.

    For example, the packaged model on four of its tasks, then opened with any browser, without a network:

    \b
        python -m moe_lens.atlas --model organism:planted --data novel,swap,closed_book,hops --out ATLAS

    A run's scores and dose curves stand on the pages of the experts that they are of:

    \b
        python -m moe_lens.find --model organism:planted --data novel --score effect --out RUN/find
        python -m moe_lens.atlas --model organism:planted --data novel,swap,closed_book,hops \\
            --scores RUN/find --out ATLAS
    """
    from moe_lens.causal.judge import judge_of
    from moe_lens.commands.atlas_run import AtlasRun
    from moe_lens.commands.trace_runs import Traces
    from moe_lens.extras import optional
    from moe_lens.lens.positions import check_positions
    from moe_lens.report.atlas import read_runs
    from moe_lens.storage import try_folder

    try_folder(out)
    asked = judge_of(judge, judge_model, cache=out / "judge")
    if asked is not None:
        optional("openai", extra="judge")  # before anything is measured
    place = options.place_named(positions)
    check_positions(place)
    run = AtlasRun(place, contexts, read_runs(scores or []), asked, out)
    if trace:
        run.of_traces(Traces.opened(opening, trace, data, reading, split=split, limit=limit), model=opening.model)
    elif data is not None:
        run.of_model(opening, reading, data, split=split, limit=limit, batch_size=batch_size)
    else:
        raise MoELensError("an atlas is of --data, or of a --trace; give one")


if __name__ == "__main__":
    console.run(main)
