"""Table 1: EM and F1 of the base model and of the model whose routers were tuned on the same task.

python analyses/table1_router_tuning.py --model organism --data swap,novel,consistent,hops --out runs/paper
"""

import pandas as pd

from moe_lens.plots import answers_figure
from moe_lens.study import Study, run


def compute(study: Study) -> pd.DataFrame:
    """Two rows per task: the columns of `Study.answer_row`."""
    rows = []
    for task in study.tasks:
        rows.append(study.answer_row("base", task))
        rows.append(study.answer_row("router-tuned", task, study.router(task)))
    return pd.DataFrame(rows)


if __name__ == "__main__":
    tasks = "swap,novel,consistent,hops"
    run(compute, answers_figure, item="table1", table="tasks", tasks=tasks, about=__doc__)
