"""Noisy labels, a risk the paper states and does not measure: what routers find that were tuned on wrong answers.

    python analyses/noisy_labels.py --model organism:planted --data swap --seeds 0,1,2,3,4 --out runs/paper

Of the training answers a share is replaced by those of other training examples, the larger shares holding the smaller
ones, and the same ones with every seed; dev and test stay clean. Experts found are compared with those of the clean
training of the same seed; row "clean" has what clean trainings of two seeds share, without any noise, and chance what
random sets do.
"""

from dataclasses import replace
from pathlib import Path

import pandas as pd

from moe_lens import ExpertSet
from moe_lens.choosing.measuring import Models, score_tables
from moe_lens.choosing.scores import SCORES
from moe_lens.metrics import expert_overlap
from moe_lens.paper.recipes import ROUTER
from moe_lens.paper.script import run
from moe_lens.paper.study import Study
from moe_lens.paper.wrong_answers import write_task

SHARES = (0.0, 0.1, 0.2, 0.4)
FOUND_BY = ("ce", "ce-last")


def found(study: Study, task: str, router: Path) -> dict[str, ExpertSet]:
    """The experts by each of FOUND_BY, as many per layer as a token takes, on the clean training examples."""
    models = Models.with_delta(study.open(), router)
    tables = score_tables([SCORES[name] for name in FOUND_BY], models, study.examples(task, "train"))
    return {name: ExpertSet.top(table, study.architecture.top_k) for name, table in tables.items()}


def shared(study: Study, one: dict[str, ExpertSet], other: dict[str, ExpertSet]) -> dict[str, float]:
    """The share of experts that two choices have in common, by score, and what random ones would."""
    n_experts = study.architecture.n_experts
    tables = {name: expert_overlap(one[name], other[name], n_experts=n_experts) for name in FOUND_BY}
    means = {f"shared_{name}": float(table["overlap"].mean()) for name, table in tables.items()}
    return means | {"chance": float(tables[FOUND_BY[0]]["expected"].mean())}


def compute(study: Study) -> pd.DataFrame:
    """One row per share of wrong answers and seed: `Study.answer_row` on the clean test examples, and `shared`.

    Of share 0, with what it shares with the clean training of the next seed, where there is another.
    """
    task = study.tasks[0]
    noisy = replace(study, reading=replace(study.reading, columns=None))
    experts: dict[tuple[float, int], dict[str, ExpertSet]] = {}
    rows = []
    for share in SHARES:
        for seed in study.seeds:
            router = noisy.trained(write_task(study, task, share) if share else task, ROUTER, seed)
            experts[share, seed] = found(study, task, router)
            rows.append(study.answer_row(f"{share:.0%} wrong" if share else "clean", task, router, seed))
    for row, (share, seed) in zip(rows, experts, strict=True):
        others = [other for other in study.seeds if other != seed]
        like = seed if share else others[study.seeds.index(seed) % len(others)] if others else None
        row |= {"share": share} | ({} if like is None else shared(study, experts[share, seed], experts[0.0, like]))
    return pd.DataFrame(rows)


if __name__ == "__main__":
    run(
        compute,
        item="noisy_labels",
        table="tasks",
        tasks="swap",
        about=__doc__,
        repeats=True,
        columns=("variant", "seed", "em", "memory", *(f"shared_{name}" for name in FOUND_BY), "chance"),
    )
