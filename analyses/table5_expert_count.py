"""Table 5: CEFT by the number of experts that learn in each layer, beside as many random ones.

python analyses/table5_expert_count.py --model organism --data swap,closed_book --seeds 0,1,2 --out runs/paper
"""

from functools import partial

import pandas as pd

from moe_lens.choosing.scores import SCORES
from moe_lens.choosing.selection import Random, Top
from moe_lens.paper.recipes import experts
from moe_lens.paper.script import run
from moe_lens.paper.study import Study

SIZES = (1, 2, 4, 8, 16, 32)
WAYS = {"CEFT": partial(Top, SCORES["ce"]), "random experts": Random}
COLUMNS = ("variant", "size", "task", "seed", "learning_rate", "trainable", "seconds", "em", "f1", "memory")


def compute(study: Study) -> pd.DataFrame:
    """One row per variant, size, seed and task: size, and the columns of `Study.answer_row`; the base has size 0.

    Trained on the first task. Where all experts learn, nothing is left to choose at random.
    """
    rows = [{"size": 0, **study.answer_row("base", task)} for task in study.tasks]
    n_experts = study.architecture.n_experts
    for name, way in WAYS.items():
        for size in [size for size in SIZES if size < n_experts or (size == n_experts and way is not Random)]:
            for seed in study.seeds:
                tuned = study.trained(study.tasks[0], experts(name, way(size)), seed)
                rows += [{"size": size, **study.answer_row(name, task, tuned, seed)} for task in study.tasks]
    return pd.DataFrame(rows)


if __name__ == "__main__":
    tasks = "swap,closed_book"
    run(compute, item="table5", table="sizes", tasks=tasks, about=__doc__, repeats=True, columns=COLUMNS)
