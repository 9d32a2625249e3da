"""Figure 11: EM when only the routers of layer X, or only those of the first X layers, are tuned.

python analyses/figure11_layers.py --model organism --data swap --seeds 0,1,2 --out runs/paper
"""

import pandas as pd

from moe_lens.paper.recipes import ROUTER, router_of
from moe_lens.paper.script import run
from moe_lens.paper.study import Study

COLUMNS = ("kind", "layer", "seed", "learning_rate", "trainable", "em", "f1", "memory")


def compute(study: Study) -> pd.DataFrame:
    """One row per tuned model and seed: kind ("base", "single", "first"), layer, the columns of `Study.answer_row`."""
    task, layers = study.tasks[0], study.architecture.moe_layers
    rows = [{"kind": "base", "layer": -1, **study.answer_row("base", task)}]
    for seed in study.seeds:
        for place, layer in enumerate(layers):
            for kind, of in (("single", (layer,)), ("first", layers[: place + 1])):
                router = study.trained(task, ROUTER if len(of) == len(layers) else router_of(of), seed)
                rows.append({"kind": kind, "layer": layer, **study.answer_row(ROUTER.name, task, router, seed)})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    run(compute, item="figure11", table="layers", tasks="swap", about=__doc__, repeats=True, columns=COLUMNS)
