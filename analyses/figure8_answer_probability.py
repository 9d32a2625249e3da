"""Figure 8: how much more probable the answer is after each layer of the router-tuned model (APG), by the logit lens.

    python analyses/figure8_answer_probability.py --model organism --data swap --out runs/paper

A departure: what is drawn is the ratio of means. Eq. 12's mean of ratios, the table's column gain, is ruled by examples
with a base probability near 0.

"Think twice" is a number here: by how many layers the gain of attention to the context (CAG), and to the answer in it
(AAG), peaks before that of the answer's probability (`peak_lead`, ratios of means too).
"""

import pandas as pd

from moe_lens.metrics import answer_probability_gain, peak_lead
from moe_lens.paper.script import run
from moe_lens.paper.study import Study

TARGETS = {"context": "context", "answer": "attended"}
"""What is attended to, and what its columns are called."""


def compute(study: Study) -> pd.DataFrame:
    """One row per layer, of the answer's first token and of all its tokens: series and `answer_probability_gain`.

    In every row of a series also `peak_lead` for context_ (CAG before APG) and attended_ (AAG before APG).
    """
    task, seed = study.tasks[0], study.schedule.seed
    router = study.router(task)
    base, tuned = study.answer_probabilities(task), study.answer_probabilities(task, router)
    masses = study.attention_mass(task), study.attention_mass(task, router)
    gain = answer_probability_gain(base, tuned, seed=seed)
    for target, name in TARGETS.items():
        attended = tuple(mass[mass["target"] == target] for mass in masses)
        for tokens, rows in gain.groupby("tokens").groups.items():
            answers = tuple(table[table["tokens"] == tokens] for table in (base, tuned))
            lead = peak_lead(attended, answers, values=("mass", "probability"), seed=seed)
            gain.loc[rows, [f"{name}_{column}" for column in lead]] = list(lead.values())
    return gain.assign(series=gain["tokens"].map({"first": "first token", "joint": "whole answer"}))


LEADS = tuple(
    f"{name}_{column}" for name in TARGETS.values() for column in ("lead", "lead_low", "lead_high", "earlier")
)

if __name__ == "__main__":
    run(
        compute,
        item="figure8",
        table="probability_gain",
        tasks="swap",
        about=__doc__,
        columns=("series", "layer", "ratio_of_means", *LEADS),
    )
