"""Table 11: other methods for context faithfulness, of prompts and of decoding, beside router tuning and CEFT.

What a method leaves open (schema, alpha, number of sentences) is chosen on the first task's dev examples.

python analyses/table11_other_methods.py --model organism --data swap,closed_book --seeds 0,1,2,3,4 --out runs/paper
"""

import pandas as pd
from table3_methods import compared

from moe_lens.paper.rivals import rivals_table
from moe_lens.paper.script import run
from moe_lens.paper.study import Study
from moe_lens.results import write_table

REFERENCE = "CEFT"
COLUMNS = ("variant", "task", "chosen", "seeds", "em", "em_low", "em_high", "f1", "memory", "answer_seconds")


def compute(study: Study) -> pd.DataFrame:
    """The columns of `rivals_table`; comparisons.parquet is `compared` of Table 3."""
    found, answers = rivals_table(study)
    made_by = study.made_by({"item": "table11", "reference": REFERENCE})
    write_table(compared(study, answers, [REFERENCE]), study.out / "table11" / "comparisons.parquet", made_by)
    return found


if __name__ == "__main__":
    run(compute, item="table11", table="tasks", tasks="swap,closed_book", about=__doc__, repeats=True, columns=COLUMNS)
