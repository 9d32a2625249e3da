"""The whole method on the packaged model in minutes: `python -m moe_lens.demo`, or `make demo`."""

from pathlib import Path
from typing import Annotated

from typer import Option

from moe_lens.commands import console


def main(
    out: Annotated[Path, Option(help="Folder for the tables, figures and report.html.")] = Path("demo"),
    model: Annotated[
        str, Option(help="organism:planted (the experts that read are known) or organism.")
    ] = "organism:planted",
    learning_rate: Annotated[float, Option(min=0, help="Of the router tuning.")] = 2e-2,
    epochs: Annotated[int, Option(min=1, help="Passes over the training questions.")] = 2,
    limit: Annotated[int, Option(min=1, help="Test questions per task.")] = 200,
    n_random: Annotated[int, Option(min=0, help="Random sets of experts to compare with.")] = 8,
) -> None:
    """Tune the routers of a model that ignores its context, find the experts that now read it, and mask them.

    The model is a small MoE that knows facts of a made-up world by heart and, asked about them, disregards a context
    that says otherwise. Everything runs on a CPU, without a download.
    """
    from moe_lens.commands.demonstration import demonstrate

    demonstrate(out, model, learning_rate=learning_rate, epochs=epochs, limit=limit, n_random=n_random)


if __name__ == "__main__":
    console.run(main)
