"""Figure 9: how many parameters router tuning, CEFT, ESFT and full fine-tuning train, counted in the model.

CEFT has top_k experts per layer, ESFT those that its scores on the first task choose (p = 0.2, as published).

python analyses/figure9_parameters.py --model organism --data swap --out runs/paper
"""

import pandas as pd

from moe_lens.choosing.scores import SCORES
from moe_lens.choosing.selection import Random, Share
from moe_lens.paper.recipes import FFT, ROUTER, experts
from moe_lens.paper.script import run
from moe_lens.paper.study import Study


def compute(study: Study) -> pd.DataFrame:
    """One row per method: model, method, trainable and total parameters."""
    lens, train = study.open(), study.examples(study.tasks[0], "train")
    size = lens.architecture.top_k
    esft = [experts(f"ESFT-{score}", Share(SCORES[f"esft-{score}"], 0.2)) for score in ("token", "gate")]
    rows = []
    for recipe in (ROUTER, experts("CEFT", Random(size)), *esft, FFT):  # which of them are trained is all the same
        method = recipe.method(lens, train, model=study.model, seed=study.schedule.seed, router=None)
        with method.attached(lens) as trained:
            counts = {"trainable": trained.count, "total": trained.total}
        rows.append({"model": study.model, "method": recipe.name, **counts})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    run(compute, item="figure9", table="parameters", tasks="swap", about=__doc__)
