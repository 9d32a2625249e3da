"""Table 4: what the methods of Table 3, trained on the first task, leave of the other tasks: MMLU in the paper.

    python analyses/table4_knowledge.py --model organism --data swap,exam,closed_book --out runs/paper

The score is accuracy over the options where the examples have some, as MMLU's, over questions and as the mean over
subjects, and else exact match. The organism's general knowledge is `exam`, the facts that it knows in words that it was
never asked in; `closed_book` asks for them as pretraining did, and it knows them all.
"""

import pandas as pd
from table3_methods import recipes
from table9_summaries import OF_OPTIONS, scores

from moe_lens.paper.script import run
from moe_lens.paper.study import Study


def compute(study: Study) -> pd.DataFrame:
    """The columns of `table9_summaries.scores`."""
    return scores(study, (None, *recipes(study)), OF_OPTIONS, trained_on=study.tasks[0])


if __name__ == "__main__":
    run(compute, item="table4", table="metrics", tasks="swap,exam,closed_book", about=__doc__)
