"""Figure 9: how many parameters router tuning, CEFT (with top_k experts per layer) and full fine-tuning train.

python analyses/figure9_parameters.py --model organism --out runs/paper
"""

import pandas as pd

from moe_lens.plots import parameters_figure
from moe_lens.study import Study, run
from moe_lens.tuning import router_parameters


def compute(study: Study) -> pd.DataFrame:
    """One row per method: model, method, trainable and total parameters, counted in the model."""
    lens = study.open()
    architecture = lens.architecture
    total = sum(parameter.numel() for parameter in lens.module.parameters())
    experts = [lens.module.get_submodule(architecture.at(layer).experts) for layer in architecture.moe_layers]
    in_experts = sum(parameter.numel() for module in experts for parameter in module.parameters())
    counts = {
        "router-tuned": sum(lens.module.get_parameter(name).numel() for name in router_parameters(lens)),
        "CEFT": in_experts * architecture.top_k // architecture.n_experts,
        "FFT": total,
    }
    rows = [{"model": study.model, "method": name, "trainable": n, "total": total} for name, n in counts.items()]
    return pd.DataFrame(rows)


if __name__ == "__main__":
    run(compute, parameters_figure, item="figure9", table="parameters", tasks="swap", about=__doc__)
