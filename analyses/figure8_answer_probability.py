"""Figure 8: how much more probable the answer is after each layer of the router-tuned model (APG), by the logit lens.

    python analyses/figure8_answer_probability.py --model organism --data swap --out runs/paper

A departure: what is drawn is the ratio of means. Eq. 12's mean of ratios, the table's column gain, is ruled by examples
with a base probability near 0.
"""

import pandas as pd

from moe_lens import MoELens
from moe_lens.metrics import answer_probability_gain
from moe_lens.paper.script import run
from moe_lens.paper.study import Study
from moe_lens.statistics import AnswerProbability


def probabilities(study: Study, lens: MoELens) -> pd.DataFrame:
    """`AnswerProbability` of the test examples: the residual stream after each layer, normed as before the head."""
    [found] = lens.measure(study.examples(study.tasks[0]), AnswerProbability(lens.project_on_vocab))
    return found.table()


def compute(study: Study) -> pd.DataFrame:
    """One row per layer, of the answer's first token and of all its tokens: series and `answer_probability_gain`."""
    base, tuned = (probabilities(study, study.open(router)) for router in (None, study.router(study.tasks[0])))
    gain = answer_probability_gain(base, tuned, seed=study.schedule.seed)
    return gain.assign(series=gain["tokens"].map({"first": "first token", "joint": "whole answer"}))


if __name__ == "__main__":
    run(compute, item="figure8", table="probability_gain", tasks="swap", about=__doc__)
