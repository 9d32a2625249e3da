"""Figure 5: routers tuned on one task, tried on the others: EM minus that of the base model.

python analyses/figure5_transfer.py --model organism --data swap,novel,consistent,hops --out runs/paper
"""

import pandas as pd

from moe_lens.metrics import bootstrap_interval
from moe_lens.paper.script import run
from moe_lens.paper.study import Study


def compute(study: Study) -> pd.DataFrame:
    """One row per pair of tasks: trained, task, n, base_em, em, em_gain with its 95 % interval over examples."""
    rows = []
    for trained in study.tasks:
        router = study.router(trained)
        for task in study.tasks:
            before, after = study.answers(task)["em"], study.answers(task, router)["em"]
            gain = bootstrap_interval((after - before).to_numpy(), bounds=(-1, 1), seed=study.schedule.seed)
            rows.append(
                {
                    "trained": trained,
                    "task": task,
                    "n": len(after),
                    "base_em": before.mean(),
                    "em": after.mean(),
                    "em_gain": gain.mean,
                    "em_gain_low": gain.low,
                    "em_gain_high": gain.high,
                }
            )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    run(compute, item="figure5", table="transfer", tasks="swap,novel,consistent,hops", about=__doc__)
