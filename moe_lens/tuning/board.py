"""Boards: the log of a run as TensorBoard, or Weights & Biases, reads it, while it grows."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from moe_lens.extras import optional

Add = Callable[[Mapping[str, float], int], object]
"""What takes the numbers of a step."""
Board = Callable[[str, int], AbstractContextManager[Add]]
"""Opens a run, by its name and the first step that it is given."""


@contextmanager
def tensorboard(folder: Path, name: str, first: int) -> Iterator[Add]:
    """Writes to tensorboard/NAME, where a run that goes on takes the place of what was written from its step on."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder / "tensorboard" / name, purge_step=first) as writer:

        def add(numbers: Mapping[str, float], step: int) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        yield add


@contextmanager
def wandb(folder: Path, name: str, first: int) -> Iterator[Add]:
    """Tells Weights & Biases, which keeps its files in wandb/; a run that goes on is one more of its name there.

    WANDB_MODE, WANDB_PROJECT and the like are heeded; without the latter the project is moe_lens.
    """
    module = optional("wandb", extra="wandb")
    folder.mkdir(parents=True, exist_ok=True)  # or else its files would go elsewhere
    with module.init(
        project=os.environ.get("WANDB_PROJECT", "moe_lens"),
        group=folder.name,
        name=name,
        dir=folder,
        reinit="create_new",
        settings=module.Settings(console="off"),  # what the process prints is not sent
    ) as run:
        yield run.log


BOARDS: Mapping[str, Callable[[Path, str, int], AbstractContextManager[Add]]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
}
"""By the name of the package, and of the option of `tune`, that they take."""


def expect_boards(names: Sequence[str]) -> None:
    """MoELensError, naming the extra, for one of BOARDS whose package is not installed."""
    extras = {"tensorboard": "board", "wandb": "wandb"}
    for name in names:
        optional(name, extra=extras[name])


@contextmanager
def following(boards: Sequence[Board], name: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Inside the block, what writes the rows of a run's log to all boards, which the first row opens.

    Of a row they get the numbers, of its routing the mean over layers, and of unused experts the sum.
    """
    with ExitStack() as stack:
        opened: list[Add] = []

        def follow(row: Mapping[str, Any]) -> None:
            if not opened:
                opened.extend(stack.enter_context(board(name, row["step"])) for board in boards)
            for add in opened:
                add(_numbers(row), row["step"])

        yield follow


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: value for name, value in row.items() if name not in ("step", "routing")}
    for name, values in row.get("routing", {}).items():
        if name != "layer":
            numbers[f"routing/{name}"] = sum(values) / (1 if name == "unused" else len(values))
    return numbers
