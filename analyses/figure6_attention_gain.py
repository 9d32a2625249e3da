"""Figure 6: how much more the router-tuned model's last token attends to the context (CAG) and to the answer (AAG).

python analyses/figure6_attention_gain.py --model organism --data swap --out runs/paper
"""

import pandas as pd

from moe_lens.metrics import attention_gain
from moe_lens.paper.script import run
from moe_lens.paper.study import Study

NAMES = {"context": "context (CAG)", "answer": "answer (AAG)"}


def compute(study: Study) -> pd.DataFrame:
    """One row per target and layer: series and the columns of `attention_gain` (Eq. 11)."""
    task = study.tasks[0]
    base, tuned = study.attention_mass(task), study.attention_mass(task, study.router(task))
    gain = attention_gain(base, tuned, seed=study.schedule.seed)
    return gain.assign(series=gain["target"].map(NAMES)).sort_values(["target", "layer"], ascending=[False, True])


if __name__ == "__main__":
    run(compute, item="figure6", table="attention_gain", tasks="swap", about=__doc__)
