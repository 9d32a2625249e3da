"""Figures 7 and 14: the prompts that router tuning sets right, coloured by what the last token attends to more.

python analyses/figure7_attention_case.py --model organism --data swap --out runs/paper
"""

import pandas as pd

from moe_lens.errors import MoELensError
from moe_lens.paper.script import run
from moe_lens.paper.study import Study
from moe_lens.report.views import attention_of_tokens

CASES = 6


def compute(study: Study) -> pd.DataFrame:
    """Columns case, note, model ("base", "tuned") and those of `attention_of_tokens`, of the first such examples."""
    task = study.tasks[0]
    router = study.router(task)
    base, tuned = study.answers(task), study.answers(task, router)
    cured = base.index[(base["em"] == 0) & (tuned["em"] == 1)]
    if cured.empty:
        raise MoELensError(
            f"tuning the routers set none of {len(base)} answers on {task} right, so there is no case to show; "
            "tune more (--learning-rate, --epochs, --limit) or take other --data"
        )
    examples = study.examples(task)
    tables = []
    for model, lens in (("base", study.open()), ("tuned", study.open(router))):
        for case in cured[:CASES]:
            before, after = base["prediction"][case], tuned["prediction"][case]
            [record] = lens.records([examples[case]], capture=("attention",), progress=False)
            table = attention_of_tokens(record, lens.tokenizer)
            note = f"The base model answers “{before}”, the router-tuned one “{after}”."
            tables.append(table.assign(case=examples[case].id, note=note, model=model))
    return pd.concat(tables, ignore_index=True)


if __name__ == "__main__":
    run(compute, item="figure7", table="attention_case", tasks="swap", about=__doc__)
