"""What the command that makes an atlas does once its options are read: of a model that runs, or of its traces."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from moe_lens.causal.judge import Judge
from moe_lens.commands import console
from moe_lens.commands.expert_atlas import Atlas
from moe_lens.commands.expert_labels import expert_labels
from moe_lens.commands.options import Opening, Reading
from moe_lens.commands.trace_runs import Traces
from moe_lens.data.lookup import names_in
from moe_lens.errors import MoELensError
from moe_lens.lens.batching import expect_places
from moe_lens.lens.positions import Positions
from moe_lens.report.atlas import RunNumbers, write_atlas
from moe_lens.results import claim, data_digest, provenance, write_table


@dataclass(frozen=True)
class AtlasRun:
    """What is shown of each expert, and where it is left. runs: numbers of other runs, by name. judge: who labels."""

    positions: Positions
    contexts: int
    runs: Mapping[str, RunNumbers]
    judge: Judge | None
    out: Path

    def of_traces(self, traces: Traces, *, model: str) -> None:
        """Leaves the atlas of a model of which there are traces alone."""
        if self.judge is not None:
            raise MoELensError("experts are labelled where the model runs; leave --judge out with --trace")
        made_by = provenance(model=model, facts=traces.facts | self._facts)
        claim(self.out, made_by)
        atlas = Atlas(traces.as_lens, self.positions, self.contexts)
        tables = atlas.tables(self.out / "tables", made_by, traces.examples)
        self._leave(tables, made_by, about=traces.model.architecture.in_short())

    def of_model(
        self, opening: Opening, reading: Reading, data: str, *, split: str, limit: int | None, batch_size: int
    ) -> None:
        """Leaves the atlas of a model on data, names with commas."""
        tasks = names_in(data)
        loaded = {task: reading.load(task, split=split, limit=limit) for task in tasks}
        lens = opening.load()
        lens.batch_size = batch_size
        fitted = {task: reading.fit(examples, lens, of=f"{task}, {split}") for task, examples in loaded.items()}
        examples = {task: one.examples for task, one in fitted.items()}
        expect_places(self.positions, examples, lens.tokenizer, template=lens.template)
        opened = opening.facts(lens)
        for name, run in self.runs.items():
            run.expect_of(opened["weights"], name=name)
        facts = opened | reading.facts(*fitted.values()) | self._facts | {"batch_size": batch_size}
        facts |= {"tasks": {task: data_digest(own) for task, own in examples.items()}}
        made_by = provenance(model=opening.model, delta=opening.delta, facts=facts)
        claim(self.out, made_by)
        tables = Atlas(lens, self.positions, self.contexts).tables(self.out / "tables", made_by, examples)
        if self.judge is not None:
            tables["labels"] = self._labels(tables, self.judge, made_by)
        self._leave(tables, made_by, about=lens.architecture.in_short())

    @property
    def _facts(self) -> dict[str, Any]:
        return {"positions": self.positions, "contexts": self.contexts}

    def _labels(self, tables: dict[str, pd.DataFrame], judge: Judge, made_by: dict[str, Any]) -> pd.DataFrame:
        labels = expert_labels(tables, judge)
        write_table(labels, self.out / "labels.parquet", made_by | {"judge": judge.model})
        without = labels.loc[labels["label"] == "", "failure"].tolist()
        if without:
            console.note(f"{len(without)} of {len(labels)} experts have no label, the first because of: {without[0]}")
        return labels

    def _leave(self, tables: dict[str, pd.DataFrame], made_by: dict[str, Any], *, about: str) -> None:
        page = write_atlas(tables, self.out, made_by, about=about, runs=self.runs)
        console.say(f"wrote {page}: open it with a browser")
