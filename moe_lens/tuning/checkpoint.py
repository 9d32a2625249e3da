"""Checkpoints of a training run: whole or not at all, so that the same command goes on after any interruption."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lens.errors import MoELensError
from moe_lens.results import expect_same_run
from moe_lens.storage import SEAL, UNSEALED, check_sealed, replacing, seal_file, try_folder

NEWEST = "newest.safetensors"
LOG = "log.jsonl"


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    step: optimizer steps done. rows: the log, one row per step. best_step, best_score: the state that did best on the
    dev data, and how well. misses: measurements since then. seconds: spent so far, over all interruptions.
    """

    step: int = 0
    rows: tuple[dict[str, Any], ...] = ()
    best_step: int | None = None
    best_score: float | None = None
    misses: int = 0
    seconds: float = 0.0
    finished: bool = False


class Checkpoints:
    """One run's checkpoints in a folder: the newest state, to go on from, the best on the dev data, and the log.

    run: JSON values that tell this run from any other, such as its schedule and a hash of its data.
    every: seconds of training between two checkpoints (one follows each measurement on the dev data besides); 0 for
        one after each step.
    Raises MoELensError for less than 0 seconds.
    """

    def __init__(self, folder: str | Path, run: Mapping[str, Any], *, every: float = 300.0) -> None:
        if not every >= 0:
            raise MoELensError(f"the seconds between checkpoints must be at least 0; got {every}")
        self.folder, self.every = Path(folder), every
        self.run = json.loads(json.dumps(dict(run)))  # as it will be read

    @property
    def newest(self) -> Path:
        """The file of the newest state."""
        return self.folder / NEWEST

    def best(self, step: int) -> Path:
        """The file of the state after `step`, once it was the best on the dev data."""
        return self.folder / f"best-{step}.safetensors"

    def make_room(self, size: int) -> None:
        """Raises MoELensError unless the folder can be written and its disk can hold checkpoints of `size` bytes."""
        try_folder(self.folder)
        held = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        there = next(place for place in (self.folder, *self.folder.parents) if place.exists())
        free = shutil.disk_usage(there).free + held
        if free < size:
            raise MoELensError(
                f"the checkpoints in {self.folder} need up to {size / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB "
                "free; choose another folder, or make room"
            )

    def load(self) -> tuple[Progress, dict[str, Tensor]] | None:
        """How far the run had come and the tensors that `save` was given; None if it has not begun.

        Raises MoELensError if another run's checkpoints are here, or they cannot be read.
        """
        if not self.newest.exists():
            return None
        facts = self._facts(self.newest)
        expect_same_run(self.folder, facts["run"], self.run)
        progress = Progress(**{**facts["progress"], "rows": tuple(facts["progress"]["rows"])})
        return progress, load_file(self.newest)

    def save(self, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        """Make `tensors` the newest state, and let go of bests that were beaten."""
        self._write(self.newest, tensors, {"run": self.run, "progress": asdict(progress)})
        for file in self.folder.glob("best-*.safetensors"):
            if progress.finished or progress.best_step is None or file != self.best(progress.best_step):
                file.unlink()

    def save_best(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the state after `step`; the newest state, saved next, will name it."""
        self._write(self.best(step), tensors, {})

    def load_best(self, step: int) -> dict[str, Tensor]:
        """The tensors that `save_best` was given for `step`."""
        self._expect_whole(self.best(step))
        return load_file(self.best(step))

    def write_log(self, rows: tuple[dict[str, Any], ...]) -> None:
        """Make the log hold exactly these rows."""
        self._write_log(rows, "w")

    def append_log(self, row: dict[str, Any]) -> None:
        """Add a row to the log, where it can be followed."""
        self._write_log((row,), "a")

    def _write_log(self, rows: tuple[dict[str, Any], ...], mode: str) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / LOG).open(mode, encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        except OSError as error:
            raise self._failure(self.folder / LOG, error) from error

    def _write(self, path: Path, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
        """The file as a whole, sealed: what was there stays until all of the new one is on the disk."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as unfinished:
                save_file(dict(tensors), unfinished, metadata={"facts": json.dumps(facts), SEAL: UNSEALED})
                seal_file(unfinished)
        except (OSError, SafetensorError) as error:
            raise self._failure(path, error) from error

    def _failure(self, path: Path, error: Exception) -> MoELensError:
        kept = f"the last good checkpoint is {self.newest}" if self.newest.exists() else "there is no checkpoint yet"
        return MoELensError(f"cannot write {path}: {error}; {kept}: make room and give the same command again")

    def _facts(self, path: Path) -> dict[str, Any]:
        self._expect_whole(path)
        with safe_open(path, "pt") as file:
            facts: dict[str, Any] = json.loads(file.metadata()["facts"])
        return facts

    def _expect_whole(self, path: Path) -> None:
        check_sealed(path, remedy=f"remove the .safetensors in {self.folder} to begin this training anew")
