"""Figure 11: EM when only the routers of layer X, or only those of the first X layers, are tuned.

python analyses/figure11_layers.py --model organism --data swap --out runs/paper
"""

import pandas as pd

from moe_lens.plots import layers_figure
from moe_lens.study import Study, run


def compute(study: Study) -> pd.DataFrame:
    """One row per tuned model: kind ("base", "single", "first"), layer, and the columns of `Study.answer_row`."""
    task = study.tasks[0]
    layers = study.open().architecture.moe_layers
    rows = [{"kind": "base", "layer": -1, **study.answer_row("base", task)}]
    for place, layer in enumerate(layers):
        for kind, tuned in (("single", [layer]), ("first", list(layers[: place + 1]))):
            router = study.router(task) if len(tuned) == len(layers) else study.router(task, tuned)
            rows.append({"kind": kind, "layer": layer, **study.answer_row("router-tuned", task, router)})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    run(compute, layers_figure, item="figure11", table="layers", tasks="swap", about=__doc__)
