"""Parts of one measurement, made by several machines: which examples a part has, and joining what all of them kept."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from moe_lens.commands import console
from moe_lens.commands.statistic_passes import Measuring
from moe_lens.commands.statistic_tables import Kept
from moe_lens.errors import MoELensError
from moe_lens.lens.delta import weights_digest
from moe_lens.lens.lens import MoELens
from moe_lens.lens.positions import Positions
from moe_lens.results import RUN_FILE, claim, expect_same_run, read_table, write_table
from moe_lens.rows_on_disk import growing_table, parts_of
from moe_lens.statistics import add_saved, save_statistic
from moe_lens.statistics.measures import MEASURES, ROUTING, WEIGHTS
from moe_lens.storage import as_json, read_sealed_json

Part = TypeVar("Part")
OWN = ("data", "sets", "shard", "command", "dropped", "truncated")
"""What tells one shard of a run from another, in its run.json."""


@dataclass(frozen=True)
class Shard:
    """Every `of`-th example, from the `number`-th on."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str | None) -> "Shard":
        """That of --shard 0/4, the whole without it; MoELensError for what is none."""
        if text is None:
            return cls(0, 1)
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
        if found is None or int(found[1]) >= int(found[2]):
            raise MoELensError(f"--shard is I/N, every N-th example from the I-th on, I from 0; got {text!r}")
        return cls(int(found[1]), int(found[2]))

    def of_all(self, examples: Sequence[Part]) -> Sequence[Part]:
        """Its examples; MoELensError where there are too few for one."""
        found = examples[self.number :: self.of]
        if not found:
            raise MoELensError(f"of {len(examples)} examples the shard {self} has none; take fewer shards")
        return found

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def merged(folders: Sequence[Path], out: Path, lens: MoELens | None) -> Kept:
    """What runs of `measure` on shards kept, joined in `out` as one run over all of their examples would keep it.

    Raises MoELensError for folders of other runs, for a shard that comes twice, and for what needs the model.
    """
    if len(folders) < 2:
        raise MoELensError(f"--merge joins two or more folders that measure wrote; got {len(folders)}")
    told = [read_sealed_json(folder / RUN_FILE, remedy="name folders that measure wrote") for folder in folders]
    _expect_one_run(folders, told)
    first = told[0]
    _expect_readable(first, lens)
    made_by = _joined(told)
    claim(out, made_by)
    said = first["positions"]
    positions: Positions = tuple(said) if isinstance(said, list) else said
    whole = Measuring(first["what"], positions, out, made_by, first["lenient"])
    shards = [replace(whole, out=folder) for folder in folders]
    kept = Kept(whole, first["variants"], list(first["sets"]), first["n_experts"])
    for variant in kept.variants:
        if WEIGHTS in whole.what:
            table = read_table(shards[0].part(variant, "", WEIGHTS))
            write_table(table, whole.part(variant, "", WEIGHTS), made_by)
        for data in kept.data:
            for name, measure in whole.statistics.items():
                statistic = measure.make(lens, positions)
                for shard in shards:
                    add_saved(statistic, shard.part(variant, data, name))
                save_statistic(statistic, whole.part(variant, data, name), made_by)
            if lens is not None:
                whole.read(lens, variant, data)
    if ROUTING in whole.what and not (path := out / f"{ROUTING}.parquet").exists():
        with growing_table(path, made_by) as file:
            for folder in folders:
                for rows in parts_of(folder / f"{ROUTING}.parquet"):
                    file.add(rows)
    return kept


def _expect_one_run(folders: Sequence[Path], told: Sequence[dict[str, Any]]) -> None:
    """MoELensError unless the folders are different shards of one run; a note where some are missing."""
    shared = [{name: value for name, value in one.items() if name not in OWN} for one in told]
    if "what" not in shared[0]:
        raise MoELensError(f"{folders[0]} holds no run of moe_lens.measure; name folders that it wrote")
    for folder, own in zip(folders[1:], shared[1:], strict=True):
        expect_same_run(folder, own, shared[0])
        if list(told[0]["sets"]) != list(told[folders.index(folder)]["sets"]):
            raise MoELensError(f"{folder} is of other data than {folders[0]}; merge runs over the same names of --data")
    names = [one["shard"] for one in told]
    if len(set(names)) < len(names) or len({name.partition("/")[2] for name in names}) > 1:
        raise MoELensError(
            f"each example may come once: expected different shards I/N of one N; got {', '.join(names)}"
        )
    if len(names) < int(names[0].partition("/")[2]):
        console.note(f"merged {', '.join(names)}: {int(names[0].partition('/')[2]) - len(names)} shards are missing")


def _expect_readable(told: dict[str, Any], lens: MoELens | None) -> None:
    """MoELensError where the model is needed and missing, or another one."""
    needing = [name for name in told["what"] if name in MEASURES and MEASURES[name].reads]
    if needing and lens is None:
        raise MoELensError(f"{', '.join(needing)} takes the model's tokens or weights again; give --model too")
    if lens is not None and weights_digest(lens.module) != told["weights"]:
        raise MoELensError("the model of --model is not the one that the shards measured; open that, in its --dtype")
    own = [name for name in needing if MEASURES[name].reads == "weights"]
    if own and len(told["variants"]) > 1 + len(told["saved"]):
        raise MoELensError(
            f"{', '.join(own)} takes each model's own weights; merge runs without --against, or without it"
        )


def _joined(told: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The provenance of the whole: that of the shards, with what tells all of them together."""
    sets = {name: [one["sets"][name] for one in told] for name in told[0]["sets"]}
    examples = sum(one["data"]["examples"] for one in told)
    data = {"examples": examples, "sha256": sha256(as_json(sets).encode()).hexdigest()}
    left = {name: sum(one[name] for one in told) for name in ("dropped", "truncated")}
    return {**told[0], "data": data, "sets": sets, "shard": "+".join(one["shard"] for one in told), **left}
