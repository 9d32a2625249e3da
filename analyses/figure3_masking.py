"""Figure 3: what is left of a router-tuned model's answers when context-faithful or other experts are masked.

python analyses/figure3_masking.py --model organism --data swap --out runs/paper
"""

import pandas as pd

from moe_lens.choosing.masking import answer_all, masking_rows, random_controls
from moe_lens.choosing.scores import SCORES, measure_usage, score_table
from moe_lens.choosing.selection import choose
from moe_lens.organism import has_planted, planted_experts
from moe_lens.paper.script import run
from moe_lens.paper.study import Study

NAMES, SIZES, RANDOM, MODE = ("ce", "oe"), (1, 2, 4), 5, "zero"


def compute(study: Study) -> pd.DataFrame:
    """The rows of a masking run on the first task."""
    task = study.tasks[0]
    router = study.router(task)
    train, test = study.examples(task, "train"), study.examples(task)
    scores = [SCORES[name] for name in NAMES]
    base = measure_usage(study.open(), train, scores)
    lens = study.open(router)
    tuned = measure_usage(lens, train, scores)
    tables = {score.name: score_table(score, base=base, tuned=tuned) for score in scores}
    sizes = [size for size in SIZES if size <= lens.architecture.n_experts - lens.architecture.top_k]
    wanted = [f"{name}:{','.join(map(str, sizes))}" for name in NAMES]
    wanted += ["planted"] if study.model.startswith("organism") and has_planted(study.model) else []
    choices = []
    for text in wanted:
        choices += choose(text, tables=tables, planted=lambda: planted_experts(study.model))
    choices += random_controls(choices, RANDOM, n_experts=lens.architecture.n_experts, seed=study.schedule.seed)
    answers = answer_all(
        lens,
        test,
        choices,
        MODE,
        study.out / "figure3",
        study.made_by(delta=router),
        max_new_tokens=study.max_new_tokens,
        batch_size=study.batch_size,
    )
    return masking_rows(answers, choices, MODE, seed=study.schedule.seed)


if __name__ == "__main__":
    run(compute, item="figure3", table="masking", tasks="swap", about=__doc__)
