"""Table 1: EM and F1 of the base model and of the model whose routers were tuned on the same task.

python analyses/table1_router_tuning.py --model organism --data swap,novel,consistent,hops --seeds 0 --out runs/paper
"""

import pandas as pd

from moe_lens.paper.recipes import ROUTER
from moe_lens.paper.script import run
from moe_lens.paper.study import Study


def compute(study: Study) -> pd.DataFrame:
    """For each task a row of the base model and one per seed: the columns of `Study.answer_row`."""
    rows = []
    for task in study.tasks:
        rows.append(study.answer_row("base", task))
        for seed in study.seeds:
            rows.append(study.answer_row(ROUTER.name, task, study.trained(task, ROUTER, seed), seed))
    return pd.DataFrame(rows)


if __name__ == "__main__":
    tasks = "swap,novel,consistent,hops"
    run(compute, item="table1", table="tasks", tasks=tasks, about=__doc__, repeats=True)
