"""Board: the log of a run as TensorBoard reads it, while it grows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_lens.extras import optional


def expect_board() -> None:
    """MoELensError, naming the extra, where TensorBoard is not installed."""
    optional("tensorboard", extra="board")


class Board:
    """Writes a run's rows to a folder; MoELensError where TensorBoard is not installed."""

    def __init__(self, folder: Path) -> None:
        expect_board()
        self._folder = folder
        self._writer: Any = None

    def add(self, row: Mapping[str, Any]) -> None:
        """A step's row of the log: its numbers, and of routing the mean over layers, of unused experts the sum.

        The first row of a run that goes on takes the place of what an earlier one wrote from its step on.
        """
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None:
            self._writer = SummaryWriter(self._folder, purge_step=row["step"])
        numbers = {name: value for name, value in row.items() if name not in ("step", "routing")}
        for name, values in row.get("routing", {}).items():
            if name != "layer":
                numbers[f"routing/{name}"] = sum(values) / (1 if name == "unused" else len(values))
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()
