"""Pretrains the model organism from scratch on a CPU: `python -m moe_lens.organism.pretrain --help`."""

import shutil
from pathlib import Path
from typing import Annotated

from typer import Option

from moe_lens.commands import console
from moe_lens.errors import MoELensError


def main(
    variant: Annotated[str, Option(help="conflict (nothing planted) or planted.")],
    out: Annotated[Path, Option(help="Folder for checkpoints and, in the end, the model.")],
    seed: Annotated[int, Option(help="Initialisation, data order and choice of planted experts.")] = 0,
    install: Annotated[bool, Option(help="Replace the packaged weights of this variant at the end.")] = False,
) -> None:
    """Pretrain the model organism on its world of made-up facts.

    Stop it at any time: the same command goes on from the last checkpoint. It runs on one thread, so that the same seed
    gives the same weights; run both variants side by side on two cores.
    """
    from moe_lens.organism.pretraining import PHASES, Pretraining, pretrain

    if variant not in PHASES:
        raise MoELensError(f"--variant must be one of {', '.join(PHASES)}, not {variant!r}")
    pretrain(Pretraining(variant, PHASES[variant], seed=seed), out)
    if install:
        shutil.copytree(out / "model", Path(__file__).parent / "weights" / variant, dirs_exist_ok=True)


if __name__ == "__main__":
    console.run(main)
