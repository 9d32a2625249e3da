"""What the organism shows, measured: `python -m moe_lens.organism.measure --help`."""

from pathlib import Path
from typing import Annotated

from typer import Option

from moe_lens.commands import console


def main(
    model: Annotated[str, Option(help="organism or organism:planted, or the folder of one.")],
    out: Annotated[Path, Option(help="Folder for the tables and, in router-SEED/, the tuned routers.")],
    seeds: Annotated[str, Option(help="Seeds of the router tuning; a claim needs five.")] = "0,1,2,3,4",
    split: Annotated[str, Option(help="The split that is answered.")] = "test",
    limit: Annotated[int | None, Option(min=1, help="Use the first so many examples of each task and split.")] = None,
) -> None:
    """Answer every task with the base model and after router tuning on `swap`, at the best learning rate on dev.

    The same command goes on where it was stopped: what each seed gave is kept in its folder.
    """
    from moe_lens.organism.tuning_effects import measure_organism

    measure_organism(model, out, seeds=console.numbers(seeds, int, what="--seeds"), split=split, limit=limit)


if __name__ == "__main__":
    console.run(main)
