"""What the command that measures does first: one pass of each variant over each data set, of which all is kept."""

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from moe_lens.architecture.quantized import is_parallel
from moe_lens.commands import console
from moe_lens.commands.asked_measures import Variant
from moe_lens.commands.shared_rows import streamed_rows
from moe_lens.data import Example
from moe_lens.lens.delta import weights_digest
from moe_lens.lens.lens import MoELens
from moe_lens.lens.parallel import agreed, connected, is_first, own_part
from moe_lens.lens.positions import Positions
from moe_lens.results import data_digest, expect_same_run, write_table
from moe_lens.rows_on_disk import provenance_of
from moe_lens.statistics import RoutingTokens, add_saved, save_statistic, weight_similarity
from moe_lens.statistics.measure_kinds import Measure
from moe_lens.statistics.measures import MEASURES, ROUTING, WEIGHTS

LONGEST = 24
"""Characters of a name, of data or a variant, that its file's name has."""


@dataclass(frozen=True)
class Measuring:
    """What is measured, and the folder that keeps what each pass gave, in parts/.

    what: names of MEASURES, ROUTING or WEIGHTS. made_by: the provenance of all of it. lenient: whether a measure that
        refuses the model or the data is left out, with a note, instead of ending the command.
    """

    what: Sequence[str]
    positions: Positions
    out: Path
    made_by: dict[str, Any]
    lenient: bool = False

    @property
    def statistics(self) -> dict[str, Measure]:
        """Those of `what` that have a statistic."""
        return {name: MEASURES[name] for name in self.what if name in MEASURES}

    def part(self, variant: str, data: str, name: str) -> Path:
        """The file of what a pass gave."""
        words = "~".join(map(_in_a_file_name, (variant, data, name)))
        return self.out / "parts" / f"{words}.parquet"

    def run(self, variant: Variant, data: Mapping[str, Sequence[Example]]) -> None:
        """One pass over each data set, unless it is kept already, and what the weights alone tell."""
        with variant.opened() as lens:
            weights = {"variant": variant.name, "weights": weights_digest(lens.module)}
            if WEIGHTS in self.what:
                table = weight_similarity(lens)
                if is_first():
                    write_table(table, self.part(variant.name, "", WEIGHTS), self.made_by | weights)
            for name, examples in data.items():
                made_by = self.made_by | weights | {"over": data_digest(examples)}
                self.measure(lens, variant.name, name, examples, made_by)

    def read(self, lens: MoELens, variant: str, data: str) -> None:
        """Makes the tables that need the model while it is open."""
        for name, measure in self.statistics.items():
            if measure.reads and measure.table is not None:
                statistic = add_saved(measure.make(lens, self.positions), self.part(variant, data, name))
                table = measure.table(statistic, lens)
                if is_first():
                    write_table(table, self.part(variant, data, f"{name}-table"), self.made_by)

    def measure(
        self, lens: MoELens, variant: str, data: str, examples: Sequence[Example], made_by: dict[str, Any]
    ) -> None:
        """One pass over a data set, unless it is kept already, and the tables that need the model."""
        self._pass(lens, variant, data, examples, made_by)
        together = is_parallel(lens.module)
        if together:  # all have to run what is run of the model, and read what the first has kept
            connected().wait_for_everyone()
        if together or is_first():
            self.read(lens, variant, data)

    def _pass(
        self, lens: MoELens, variant: str, data: str, examples: Sequence[Example], made_by: dict[str, Any]
    ) -> None:
        """All that is asked for and not there yet, in one pass."""
        files = {name: self.part(variant, data, name) for name in (*self.statistics, ROUTING) if name in self.what}
        absent = agreed(lambda: [name for name, path in files.items() if not self._is_kept(path, name, made_by)])
        missing = {name: files[name] for name in absent}
        if not missing:
            return
        console.say(f"{variant}, {data}: {len(examples)} examples, {', '.join(missing)}")
        made = {name: MEASURES[name].make(lens, self.positions) for name in missing if name != ROUTING}
        unlike = {(type(one).__name__, str(one.settings)): one for one in made.values()}
        made = {name: unlike[type(one).__name__, str(one.settings)] for name, one in made.items()}
        with ExitStack() as open_file:
            streamed = []
            if ROUTING in missing:
                asked = missing[ROUTING], made_by, own_part(lens.module), lens.batch_size
                streamed = [open_file.enter_context(streamed_rows(RoutingTokens(self.positions), *asked))]
            lens.measure(examples, *unlike.values(), *streamed)
        for name, statistic in made.items() if is_first() else ():
            save_statistic(statistic, missing[name], made_by)

    def _is_kept(self, path: Path, name: str, made_by: dict[str, Any]) -> bool:
        """Whether the part is there; MoELensError for one of another run."""
        if name == ROUTING and (whole := self.out / f"{ROUTING}.parquet").exists():
            expect_same_run(whole, provenance_of(whole), self.made_by)
            return True
        if not path.exists():
            return False
        told = provenance_of(path)
        told.pop("statistic", None)
        expect_same_run(path, told, made_by)
        return True


def _in_a_file_name(text: str) -> str:
    """A short text of letters as it is; others with a digest: no two share a file, and no name is too long."""
    plain = re.sub(r"[^\w.@=-]+", "_", text)[-LONGEST:]
    return plain if plain == text else f"{plain}-{sha256(text.encode()).hexdigest()[:8]}"
