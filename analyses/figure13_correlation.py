"""Figure 13: EM against attention gain over models tuned in their first X layers; the paper finds r = 0.95.

python analyses/figure13_correlation.py --model organism --data swap --out runs/paper
"""

import pandas as pd
from scipy.stats import pearsonr

from moe_lens.metrics import attention_gain
from moe_lens.paper.script import run
from moe_lens.paper.study import Study


def compute(study: Study) -> pd.DataFrame:
    """One row per model and target: EM, gain (Eq. 11) and ratio_of_means, both averaged over layers, and Pearson's r.

    The base model stands with a gain of 0. r_of_means is the correlation with the ratio of means.
    """
    task = study.tasks[0]
    base = study.attention_mass(task)
    rows = [{"target": target, "model": "base", "gain": 0.0, "ratio_of_means": 0.0} for target in ("context", "answer")]
    ems = {"base": study.answers(task)["em"].mean()}
    for name, router in study.first_layers(task).items():
        ems[name] = study.answers(task, router)["em"].mean()
        gains = attention_gain(base, study.attention_mass(task, router), resamples=1)
        for target, part in gains.groupby("target"):
            mean = part[["gain", "ratio_of_means"]].mean()
            rows.append({"target": target, "model": name, **mean})
    table = pd.DataFrame(rows)
    table["em"] = table["model"].map(ems)
    for target, part in table.groupby("target"):
        found = pearsonr(part["gain"], part["em"])
        low, high = found.confidence_interval()
        here = table["target"] == target
        table.loc[here, ["r", "r_low", "r_high"]] = found.statistic, low, high
        table.loc[here, "r_of_means"] = pearsonr(part["ratio_of_means"], part["em"]).statistic
    return table.sort_values("target", ascending=False, kind="stable")


if __name__ == "__main__":
    run(compute, item="figure13", table="correlation", tasks="swap", about=__doc__)
