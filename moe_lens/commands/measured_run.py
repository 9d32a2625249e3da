"""What commands that measure do once their options are read: models over data sets, into a folder."""

from dataclasses import dataclass
from pathlib import Path

from moe_lens.commands.asked_measures import Asked
from moe_lens.commands.options import Opening, Reading
from moe_lens.commands.shards import Shard
from moe_lens.commands.statistic_passes import Measuring
from moe_lens.commands.statistic_tables import Kept
from moe_lens.data.lookup import names_in
from moe_lens.errors import MoELensError
from moe_lens.lens.batching import expect_places
from moe_lens.lens.parallel import connected, from_first_process, sharing
from moe_lens.results import claim, provenance


@dataclass(frozen=True)
class MeasuredRun:
    """What is measured where; data: names with commas."""

    opening: Opening
    reading: Reading
    data: str
    split: str
    limit: int | None
    batch_size: int
    out: Path
    part: Shard

    def leave(self, asked: Asked, *, title: str = "What was measured") -> None:
        """Measures what is asked for, as far as it is not there yet, and leaves tables and a page of this title."""
        sets = names_in(self.data)
        asked.expect_several(sets)
        read = {name: self.reading.load(name, split=self.split, limit=self.limit) for name in sets}
        loaded = {name: self.part.of_all(examples) for name, examples in read.items()}
        processes = connected()
        opening = self.opening.of_process(processes)
        lens = opening.load()
        lens.batch_size, lens.progress = self.batch_size, processes.is_main_process
        fitted = {name: self.reading.fit(own, lens, of=f"{name}, {self.split}") for name, own in loaded.items()}
        examples = {name: one.examples for name, one in fitted.items()}
        expect_places(asked.positions, examples, lens.tokenizer, template=lens.template)
        facts = asked.facts(lens, examples) | {"batch_size": self.batch_size, "shard": str(self.part)}
        facts |= {"split": self.split} | opening.facts(lens) | self.reading.facts(*fitted.values())
        every = [example for own in examples.values() for example in own]
        if not every:
            raise MoELensError(f"there are no examples to measure in {self.data}; take more, or fewer shards")
        names = asked.names()
        if asked.lenient:
            names = asked.possible(names, lens, every[0])
        told = facts | {"what": names}
        made_by = provenance(model=opening.model, delta=opening.delta, data=every, facts=told)
        from_first_process(lambda: claim(self.out, made_by))
        measuring = Measuring(names, asked.positions, self.out, made_by, asked.lenient)
        with sharing():
            for variant in asked.opened(opening, lens):
                measuring.run(variant, examples)
        if processes.is_main_process:
            Kept(measuring, asked.variants, list(examples), lens.architecture.n_experts).leave(title=title)
