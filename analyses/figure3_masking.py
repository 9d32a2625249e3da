"""Figure 3: what is left of a router-tuned model's answers when context-faithful or other experts are masked.

python analyses/figure3_masking.py --model organism --data swap --out runs/paper
"""

import pandas as pd

from moe_lens.choosing.masking import mask
from moe_lens.choosing.measuring import Models, score_tables
from moe_lens.choosing.planted import has_planted
from moe_lens.choosing.scores import SCORES
from moe_lens.choosing.selection import Ground, Planted, Selection, Top, choices
from moe_lens.paper.script import run
from moe_lens.paper.study import Study

SCORED_BY, SIZES, RANDOM = (SCORES["ce"], SCORES["oe"]), (1, 2, 4), 5


def compute(study: Study) -> pd.DataFrame:
    """The rows of a masking run on the first task."""
    task = study.tasks[0]
    router = study.router(task)
    architecture, seed = study.architecture, study.schedule.seed
    sizes = [size for size in SIZES if size <= architecture.n_experts - architecture.top_k]
    wanted: list[Selection] = [Top(score, size) for score in SCORED_BY for size in sizes]
    wanted += [Planted()] if has_planted(study.model) else []
    tables = score_tables(SCORED_BY, Models.with_delta(study.open(), router), study.examples(task, "train"))
    return mask(
        study.open(router),
        study.examples(task),
        choices(wanted, Ground(architecture, study.model, tables, seed=seed)),
        controls=RANDOM,
        max_new_tokens=study.max_new_tokens,
        out=study.out / "figure3",
        made_by=study.made_by({}, delta=router),
        seed=seed,
    ).rows


if __name__ == "__main__":
    run(compute, item="figure3", table="masking", tasks="swap", about=__doc__)
