"""Table 11: other ways to be faithful to the context, chosen on dev, and answers of each with what they cost."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pandas as pd

from moe_lens.causal.evaluation import answer_table
from moe_lens.choosing.scores import SCORES
from moe_lens.choosing.selection import Top
from moe_lens.data import SCHEMAS
from moe_lens.data.sentences import sentences
from moe_lens.decoding import CAD, PLAIN, AdaCAD, Cited, Decoding
from moe_lens.metrics import seeds_interval
from moe_lens.paper.recipes import ROUTER, Recipe, experts, read_cost
from moe_lens.paper.study import Study, file_name
from moe_lens.results import kept

ALPHAS = (0.25, 0.5, 1.0, 2.0, 4.0)
KEPT_SENTENCES = (1, 2, 3, 4, 8, 16)


@dataclass(frozen=True)
class Way:
    """How a model is asked, None as the study says, and how it comes by its answers."""

    template: str | None = None
    decoding: Decoding = PLAIN

    def __str__(self) -> str:
        return " ".join(filter(None, (self.template, str(self.decoding) if self.decoding != PLAIN else None)))


@dataclass(frozen=True)
class Rival:
    """A row of the table: what is trained (None: nothing), and the ways of which the best on dev is taken."""

    name: str
    recipe: Recipe | None = None
    ways: tuple[Way, ...] = (Way(),)


def rivals(study: Study) -> list[Rival]:
    """The rows. A k of ContextCite that would shorten no context of the first task's dev examples is not tried."""
    longest = max(len(sentences(example.context)) for example in study.examples(study.tasks[0], "dev"))
    cad = tuple(Way(decoding=CAD(alpha)) for alpha in ALPHAS)
    cited = tuple(Way(decoding=Cited(k)) for k in KEPT_SENTENCES if k < longest) or (Way(),)
    found = [Rival("base"), Rival("ContextCite", ways=cited)]
    found += [Rival("CFP", ways=tuple(Way(template=name) for name in SCHEMAS)), Rival("CAD", ways=cad)]
    found.append(Rival("AdaCAD", ways=(Way(decoding=AdaCAD()),)))
    for recipe in (ROUTER, experts("CEFT", Top(SCORES["ce"], study.architecture.top_k))):
        found.append(Rival(recipe.name, recipe))
        found.append(Rival(f"{recipe.name} with ContextCite", recipe, cited))
        found.append(Rival(f"{recipe.name} with CAD", recipe, cad))
    return found


def answers(study: Study, task: str, split: str, tuned: Path | None, way: Way) -> pd.DataFrame:
    """`answer_table` with the CPU seconds of each answer (their mean) as `seconds`; kept in the run."""
    whose = "base" if tuned is None else tuned.name
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{file_name(task)} {split} by {whose} {way}".strip())
    made_by = study.measured_by(task, tuned, split=split) | {"decoding": str(way.decoding)}
    asked = study if way.template is None else replace(study, opening=replace(study.opening, template=way.template))
    made_by |= {"template": asked.opening.asked().facts()}

    def answered() -> pd.DataFrame:
        lens, before = asked.open(tuned), process_time()
        examples = study.examples(task, split)
        found = answer_table(lens, examples, max_new_tokens=study.max_new_tokens, decoding=way.decoding)
        return found.assign(seconds=(process_time() - before) / len(examples))

    return kept(study.out / "rivals" / f"{name}.parquet", made_by, answered)


def best_way(study: Study, rival: Rival) -> Way:
    """The way with the highest exact match on the first task's dev examples, the first of equals.

    Of a trained model with the first seed, and used with every seed.
    """
    if len(rival.ways) == 1:
        return rival.ways[0]
    task = study.tasks[0]
    tuned = None if rival.recipe is None else study.trained(task, rival.recipe)
    return max(rival.ways, key=lambda way: answers(study, task, "dev", tuned, way)["em"].mean())


def rival_row(study: Study, rival: Rival, way: Way, task: str, tuned: Sequence[Path | None]) -> dict[str, Any]:
    """A row of `rivals_table`: the answers to a task's test examples of each training."""
    found = [answers(study, task, "test", one, way) for one in tuned]
    em = seeds_interval([one["em"] for one in found], bounds=(0, 1), seed=study.schedule.seed)
    memory = pd.concat(found)["memory"]
    seconds = [read_cost(one).seconds for one in tuned if one is not None]
    return {
        "variant": rival.name,
        "task": task,
        "chosen": str(way),
        "seeds": len(tuned),
        "n": len(found[0]),
        "em": em.mean,
        "em_low": em.low,
        "em_high": em.high,
        "f1": float(np.mean([one["f1"].mean() for one in found])),
        "memory": None if memory.isna().all() else float(memory.mean()),
        "training_seconds": float(np.mean(seconds)) if seconds else None,
        "answer_seconds": float(np.mean([one["seconds"].iloc[0] for one in found])),
    }


def rivals_table(study: Study) -> tuple[pd.DataFrame, dict[tuple[str, str], list[pd.Series]]]:
    """One row per rival and task, and by both the EM of each seed's answers.

    Columns: variant, task, chosen (the schema or decoding that did best on dev), seeds, n, em with the interval of
    `seeds_interval`, f1, memory, training_seconds (wall, the mean of one training) and answer_seconds (CPU, the mean of
    one answer). What is not trained answers alike under every seed.
    """
    rows, em = list[dict[str, Any]](), dict[tuple[str, str], list[pd.Series]]()
    for rival in rivals(study):
        way, recipe = best_way(study, rival), rival.recipe
        tuned: list[Path | None] = [None]
        if recipe is not None:
            tuned = [study.trained(study.tasks[0], recipe, seed) for seed in study.seeds]
        for task in study.tasks:
            rows.append(rival_row(study, rival, way, task, tuned))
            of_each = [answers(study, task, "test", one, way)["em"] for one in tuned]
            em[rival.name, task] = of_each if recipe is not None else of_each * len(study.seeds)
    return pd.DataFrame(rows), em
