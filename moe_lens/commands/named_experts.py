"""The experts that the options of a masking command name: read at once, and chosen when the model is open."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from moe_lens.choosing.masking import check_choices
from moe_lens.choosing.measuring import Models, score_tables
from moe_lens.choosing.procedures import Examples, Load
from moe_lens.choosing.selection import Choice, Ground, choices, parse, scores_of
from moe_lens.commands import console
from moe_lens.commands.options import Opening, Scoring
from moe_lens.commands.prompt_lists import Asked
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens.delta import weights_digest
from moe_lens.lens.interventions import Mode
from moe_lens.lens.lens import MoELens
from moe_lens.results import data_digest, portable, provenance


@dataclass(frozen=True)
class Measuring:
    """On what scores are measured: as `score_tables` takes it."""

    models: Models
    examples: Examples
    made_by: dict[str, Any]
    load: Load


class NamedExperts:
    """What --experts, --compare or --mask name.

    Raises MoELensError for what cannot be read, and for scores without the models or data that they need.
    """

    def __init__(
        self,
        texts: Sequence[str],
        opening: Opening,
        scoring: Scoring,
        reading: Asked,
        data: str,
        *,
        mode: Mode,
        layers: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        if not mode.needs_experts and texts:
            raise MoELensError(f"{mode.name} is on all experts of its layers; leave {', '.join(texts)} out")
        self.selections = [selection for text in texts for selection in parse(text)]
        self.scores = scores_of(self.selections)
        self._opening, self._scoring, self._reading, self._data = opening, scoring, reading, data
        self._mode, self._layers, self._seed = mode, layers, seed
        if scoring.base is not None and not any(score.needs_base for score in self.scores):
            console.note("note: no score that is asked for needs the model before tuning; --base changes nothing")
        alone = opening.delta is None and scoring.base is None
        of = {score.of for score in self.scores} - {"model"}
        compared = "gain" in of or len(of) > 1
        if compared and alone:
            raise MoELensError(
                "these scores compare a tuned model with its base; give --delta, or --base for a tuned --model"
            )
        if alone and "tuned" in of:
            console.note(f"note: {opening.model} is taken to be router-tuned; give --delta if it is not")
        self.base = cache(replace(opening, model=scoring.base or opening.model, delta=None).load)
        """Opens the model before tuning, once."""
        self._to_score = reading.load(data, split=scoring.score_split, limit=scoring.score_limit) if self.scores else []

    def told(self) -> dict[str, Any]:
        """For the provenance: what was asked for, and what scores are measured on."""
        texts = [selection.told for selection in self.selections]
        return {"chosen": texts, "layers": self._layers, "scored_on": data_digest(self._to_score), "seed": self._seed}

    def check(self, lens: MoELens) -> None:
        """MoELensError for layers and experts that the model lacks or cannot spare, before any score is measured."""
        for layer in self._layers or ():
            lens.architecture.at(layer)
        for selection in self.selections:
            selection.check(lens.architecture)
        unscored = [selection for selection in self.selections if selection.score is None]
        check_choices(lens, [*self._of_the_router, *choices(unscored, self._ground(lens))], self._mode)

    def choose(self, lens: MoELens, out: Path) -> list[Choice]:
        """The sets of experts; what their scores are is kept in `out`."""
        tables = {}
        if self.scores:
            on = self.measuring(lens)
            tables = score_tables(
                self.scores,
                on.models,
                on.examples,
                out=out,
                made_by=on.made_by,
                batch_size=lens.batch_size,
                load=on.load,
            )
        return self.chosen(lens, tables)

    def chosen(self, lens: MoELens, tables: Mapping[str, pd.DataFrame]) -> list[Choice]:
        """The sets of experts by the scores' tables."""
        found = [*self._of_the_router, *choices(self.selections, replace(self._ground(lens), tables=tables))]
        check_choices(lens, found, self._mode)
        return found

    def measuring(self, lens: MoELens) -> Measuring:
        """On what the scores are measured."""
        examples = self._reading.fit(self._to_score, lens, of=f"{self._data}, {self._scoring.score_split}").examples
        facts = self._opening.facts(lens)
        if self._scoring.base is not None and any(score.needs_base for score in self.scores):
            # its name does not tell its weights
            facts |= {"base": portable(self._scoring.base), "base_weights": weights_digest(self.base().module)}
        made_by = provenance(model=self._opening.model, delta=self._opening.delta, data=examples, facts=facts)
        models = Models.opened(self.base, lens)
        return Measuring(models, examples, made_by, load=cache(lambda spec: self._load(spec, lens)))

    def _load(self, spec: str, lens: MoELens) -> Examples:
        """What a score names itself, read as --data is; of [column=value] alone that part of --data."""
        spec = self._data + spec if spec.startswith("[") else spec
        found = self._reading.load(spec, split=self._scoring.score_split, limit=self._scoring.score_limit)
        return self._reading.fit(found, lens, of=f"{spec}, {self._scoring.score_split}").examples

    @property
    def _of_the_router(self) -> list[Choice]:
        """What stands in tables for an intervention on no experts in particular."""
        return [] if self._mode.needs_experts else [Choice("router", self._mode.name, ExpertSet())]

    def _ground(self, lens: MoELens) -> Ground:
        return Ground(lens.architecture, self._opening.model, seed=self._seed, layers=self._layers)
