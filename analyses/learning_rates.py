"""What each method learns and forgets at two learning rates: a choice of experts and a rate are easily confused.

Table 3 takes for each method the rate that is best on dev, and a higher rate also forgets more.

python analyses/learning_rates.py --model organism --data swap,closed_book --seeds 0,1,2 --out runs/paper
"""

from dataclasses import replace

import pandas as pd
from table3_methods import REFERENCE, compared, recipes

from moe_lens.paper.script import run
from moe_lens.paper.study import Study
from moe_lens.results import write_table

RATES = {"router": (1e-2, 3e-2), "experts": (3e-3, 1e-2), "all": (3e-4, 1e-3)}
COLUMNS = ("variant", "learning_rate", "task", "seed", "trainable", "em", "f1", "memory")


def compute(study: Study) -> pd.DataFrame:
    """One row per method of Table 3, learning rate, seed and task: the columns of `Study.answer_row`.

    comparisons.parquet is `compared`, of each method at each rate with CEFT at each of its own, corrected together.
    """
    rows, answers = [study.answer_row("base", task) for task in study.tasks], {}
    for recipe in recipes(study):
        for rate in RATES[recipe.kind]:
            for seed in study.seeds:
                tuned = study.trained(study.tasks[0], replace(recipe, rate=rate), seed)
                for task in study.tasks:
                    rows.append(study.answer_row(recipe.name, task, tuned, seed))
                    answers.setdefault((f"{recipe.name} {rate:g}", task), []).append(study.answers(task, tuned)["em"])
    comparisons = compared(study, answers, [f"{REFERENCE} {rate:g}" for rate in RATES["experts"]])
    made_by = study.made_by({"item": "learning_rates", "reference": REFERENCE})
    write_table(comparisons, study.out / "learning_rates" / "comparisons.parquet", made_by)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    tasks = "swap,closed_book"
    run(compute, item="learning_rates", table="tradeoff", tasks=tasks, about=__doc__, repeats=True, columns=COLUMNS)
