"""Splits a dense model's feed-forward layers into experts: `python -m moe_lens.organism.split --help`."""

from pathlib import Path
from typing import Annotated

from typer import Option

from moe_lens.commands import console
from moe_lens.commands.options import Reading


def main(
    model: Annotated[str, Option(help="A dense, Llama-like model: a hub id, a folder, or a .gguf file.")],
    data: Annotated[
        str,
        Option(help="Texts to split and distil by: prompts with their answers, of data sets with commas between."),
    ],
    out: Annotated[Path, Option(help="Folder for the model (OUT/model), checkpoints and split.parquet.")],
    reading: Reading,
    experts: Annotated[int, Option(help="Routed experts of each layer.")] = 16,
    top_k: Annotated[int, Option(help="How many of them a token is sent to.")] = 8,
    shared: Annotated[int, Option(help="How many experts' worth of neurons all tokens go through.")] = 32,
    texts: Annotated[int, Option(min=1, help="Texts to distil on, equally many of each of --data.")] = 300,
    fit_texts: Annotated[int, Option(min=1, help="Of these, texts by which neurons are grouped.")] = 60,
    held_out: Annotated[int, Option(min=1, help="Further texts, on which losses are measured.")] = 32,
    epochs: Annotated[int, Option(min=0, help="Passes over the texts; 0 for none: the model as it is split.")] = 1,
    router_epochs: Annotated[int, Option(min=0, help="Passes before these in which the routers learn alone.")] = 0,
    learning_rate: Annotated[float, Option(help="The highest of distillation.")] = 4e-4,
    batch_size: Annotated[int, Option(min=1, help="Texts of a step.")] = 1,
    seed: Annotated[int, Option(min=0, max=2**31 - 1, help="Groups and the order of texts.")] = 0,
) -> None:
    """Make a mixture of experts of a dense model, and teach it to answer as the dense one does.

    Shared experts hold the neurons that do most; the others are grouped by what they do together, and a router is
    fitted to what each group writes. Stop it at any time: the same command goes on.

    python -m moe_lens.organism.split --model FOLDER --data nq-swap,squad --max-length 300 --out RUN/split
    """
    from moe_lens.organism.moefication import Parts
    from moe_lens.organism.splitting import Splitting, split_and_distil
    from moe_lens.tuning import Schedule

    parts = Parts(experts, top_k, shared)
    schedules = [
        Schedule(learning_rate=learning_rate, epochs=count, batch_size=batch_size, seed=seed) if count else None
        for count in (router_epochs, epochs)
    ]
    split_and_distil(
        Splitting(model, data, parts, texts, fit_texts, held_out, schedules[0], schedules[1], seed), reading, out
    )


if __name__ == "__main__":
    console.run(main)
