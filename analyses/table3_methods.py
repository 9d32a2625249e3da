"""Table 3: what router tuning, CEFT, ESFT and full fine-tuning learn of the first task, and what they forget.

CEFT also with experts chosen at random, by `ce-last`, and planted ones; every set has as many as a token takes.

python analyses/table3_methods.py --model organism --data swap,novel,closed_book --seeds 0,1,2 --out runs/paper
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd

from moe_lens.choosing.planted import has_planted
from moe_lens.choosing.scores import SCORES
from moe_lens.choosing.selection import Planted, Random, Top
from moe_lens.metrics import SUPPORTING, compare, holm, seeds_interval
from moe_lens.paper.recipes import FFT, ROUTER, Recipe, experts
from moe_lens.paper.script import run
from moe_lens.paper.study import Study
from moe_lens.results import write_table

REFERENCE = "CEFT"
COLUMNS = ("variant", "task", "seed", "learning_rate", "trainable", "seconds", "em", "f1", "memory")


def recipes(study: Study) -> list[Recipe]:
    """What is compared on this model."""
    size = study.architecture.top_k
    chosen = {"CEFT": "ce", "CEFT, ce-last": "ce-last", "ESFT-token": "esft-token", "ESFT-gate": "esft-gate"}
    found = [ROUTER, *(experts(name, Top(SCORES[score], size)) for name, score in chosen.items())]
    found.append(experts("random experts", Random(size)))
    if has_planted(study.model):
        found.append(experts("planted experts", Planted()))
    return [*found, FFT]


def compared(study: Study, answers: dict[tuple[str, str], list[pd.Series]], references: Sequence[str]) -> pd.DataFrame:
    """EM of every variant minus each reference's by task: difference, its interval over seeds and examples, p, p_holm.

    answers: the EM column of each seed, by variant and task.
    p: of the paired permutation test over examples, given these trainings; p_holm: corrected over the whole table.
    differs: whether p_holm is below 0.05 and the interval, which other seeds would move too, leaves out 0; missing for
    fewer than five seeds, which support no such claim.
    """
    rows, done = [], set()
    for reference, (variant, task) in product(references, answers):
        if variant == reference or (reference, variant, task) in done:
            continue
        done.add((variant, reference, task))
        difference = np.array(answers[variant, task]) - np.array(answers[reference, task])  # [seed, example]
        interval = seeds_interval(difference, bounds=(-1, 1), seed=study.schedule.seed)
        p = compare(difference.mean(axis=0), np.zeros(difference.shape[1]), seed=study.schedule.seed).p
        names = {"variant": variant, "reference": reference, "task": task, "seeds": len(difference)}
        rows.append(names | {"difference": interval.mean, "low": interval.low, "high": interval.high, "p": p})
    table = pd.DataFrame(rows)
    table["p_holm"] = holm(table["p"])
    differs = (table["p_holm"] < 0.05) & ((table["low"] > 0) | (table["high"] < 0))
    return table.assign(differs=differs.astype("boolean").where(table["seeds"] >= SUPPORTING))


def compute(study: Study) -> pd.DataFrame:
    """One row per variant, seed and task: the columns of `Study.answer_row`; comparisons.parquet is `compared`."""
    rows, answers = [study.answer_row("base", task) for task in study.tasks], {}
    for task in study.tasks:
        answers["base", task] = [study.answers(task)["em"]] * len(study.seeds)
    for recipe in recipes(study):
        for seed in study.seeds:
            tuned = study.trained(study.tasks[0], recipe, seed)
            for task in study.tasks:
                rows.append(study.answer_row(recipe.name, task, tuned, seed))
                answers.setdefault((recipe.name, task), []).append(study.answers(task, tuned)["em"])
    made_by = study.made_by({"item": "table3", "reference": REFERENCE})
    write_table(compared(study, answers, [REFERENCE]), study.out / "table3" / "comparisons.parquet", made_by)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    tasks = "swap,novel,closed_book"
    run(compute, item="table3", table="tasks", tasks=tasks, about=__doc__, repeats=True, columns=COLUMNS)
