"""Table 10: the methods on a task that needs no context, MemoTrap in the paper; the organism's is `otherwise`.

    python analyses/table10_without_context.py --model organism --data otherwise --out runs/paper

The score is accuracy over the options where the examples have some, as MemoTrap's, and else exact match.
"""

import pandas as pd
from table9_summaries import ceft, scores

from moe_lens.paper.recipes import FFT, ROUTER
from moe_lens.paper.script import run
from moe_lens.paper.study import Study


def compute(study: Study) -> pd.DataFrame:
    """The columns of `table9_summaries.scores`."""
    return scores(study, (None, ROUTER, FFT, ceft(study)), ["accuracy"])


if __name__ == "__main__":
    run(compute, item="table10", table="metrics", tasks="otherwise", about=__doc__)
