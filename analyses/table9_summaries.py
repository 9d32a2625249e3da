"""Table 9: a task that is no question, summaries (Gigaword in the paper): BLEU, METEOR and ROUGE-L of each method.

    python analyses/table9_summaries.py --model organism --data summary --max-new-tokens 32 --out runs/paper

The paper does not say which BLEU: `bleu` is the mean over sentences, `corpus_bleu` that of all summaries together.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from moe_lens.causal import evaluate
from moe_lens.causal.judge import Judge
from moe_lens.choosing.scores import SCORES
from moe_lens.choosing.selection import Top
from moe_lens.errors import MoELensError
from moe_lens.metrics.wordnet import wordnet
from moe_lens.paper.recipes import FFT, ROUTER, Recipe, experts
from moe_lens.paper.script import run
from moe_lens.paper.study import Study

METRICS = ("bleu", "corpus_bleu", "meteor", "rouge_l")
OF_OPTIONS = ("accuracy", "accuracy_over_groups")


def ceft(study: Study) -> Recipe:
    """CEFT with as many experts per layer as a token takes."""
    return experts("CEFT", Top(SCORES["ce"], study.architecture.top_k))


def scores(
    study: Study,
    recipes: Sequence[Recipe | None],
    metrics: Sequence[str],
    *,
    trained_on: str | None = None,
    judge: Judge | None = None,
) -> pd.DataFrame:
    """One row per task, recipe (None: the base model) and metric; those of options become `em` for a task without.

    trained_on: the task of all trainings, which is then not scored; by default each task has its own.
    Columns: variant, task, metric, n, missing, and mean with its 95 % interval over examples in low and high.
    """
    parts = []
    for task in study.tasks:
        if task == trained_on:
            continue
        examples = study.examples(task)
        options = all(example.options for example in examples)
        for recipe in recipes:
            tuned: Path | None = None if recipe is None else study.trained(trained_on or task, recipe)
            found = evaluate(
                study.open(tuned),
                examples,
                metrics=list(dict.fromkeys("em" if name in OF_OPTIONS and not options else name for name in metrics)),
                max_new_tokens=study.max_new_tokens,
                judge=judge,
                seed=study.schedule.seed,
            )
            name = "base" if recipe is None else recipe.name
            parts.append(found.summary.drop(columns="intervention").assign(variant=name, task=task))
    return pd.concat(parts, ignore_index=True)


def compute(study: Study) -> pd.DataFrame:
    """The columns of `scores`; where WordNet is missing METEOR is left out, which is said."""
    metrics = list(METRICS)
    try:
        wordnet()
    except MoELensError as error:
        metrics.remove("meteor")
        print(f"table9 without METEOR: {error}", file=sys.stderr)
    return scores(study, (None, ROUTER, ceft(study), FFT), metrics)


if __name__ == "__main__":
    run(compute, item="table9", table="metrics", tasks="summary", answer_tokens=32, about=__doc__)
