"""Figure 12: the attention gain of models in which the routers of the first X layers were tuned.

python analyses/figure12_first_layers_gain.py --model organism --data swap --out runs/paper
"""

import pandas as pd

from moe_lens.metrics import attention_gain
from moe_lens.paper.script import run
from moe_lens.paper.study import Study

PANELS = {"context": "context (CAG)", "answer": "answer (AAG)"}


def compute(study: Study) -> pd.DataFrame:
    """One row per tuned model, target and layer: series, panel and the columns of `attention_gain`."""
    task = study.tasks[0]
    base = study.attention_mass(task)
    parts = [
        attention_gain(base, study.attention_mass(task, router), seed=study.schedule.seed).assign(series=name)
        for name, router in study.first_layers(task).items()
    ]
    table = pd.concat(parts, ignore_index=True)
    return table.assign(panel=table["target"].map(PANELS)).sort_values("target", ascending=False, kind="stable")


if __name__ == "__main__":
    run(compute, item="figure12", table="attention_gain", tasks="swap", about=__doc__)
