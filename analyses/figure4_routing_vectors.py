"""Figure 4: t-SNE of the activation rates of the context-faithful experts, an example of each task as a mark.

    python analyses/figure4_routing_vectors.py --model organism --data swap,novel,consistent,hops --out runs/paper

The paper routes each task's examples with the routers tuned on that task, so that the model changes with the task and
may set the tasks apart by itself. Beside it stand the same examples in one model: tuned on the first task, and base.
"""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from moe_lens import ExpertSet, ExpertUsage
from moe_lens.data.dataset import carve
from moe_lens.metrics import routing_map, separability
from moe_lens.paper.script import run
from moe_lens.paper.study import Study
from moe_lens.report.plots.clusters import COLUMNS
from moe_lens.statistics import RoutingVectors

PER_TASK = 1000


def faithful_experts(study: Study, routers: Mapping[str, Path]) -> ExpertSet:
    """The experts that are context-faithful for any task: the top_k of each layer by Eq. 8 on its train split."""
    faithful = ExpertSet()
    for task, router in routers.items():
        lens = study.open(router)
        [usage] = lens.measure(study.examples(task, "train"), ExpertUsage())
        faithful |= ExpertSet.top(usage.table(), lens.architecture.top_k)
    return faithful


def vectors(study: Study, routers: Mapping[str, Path | None], experts: ExpertSet) -> pd.DataFrame:
    """`RoutingVectors` of PER_TASK test examples of each task, drawn at random, with the routers given for it."""
    parts = []
    for task, router in routers.items():
        examples = study.examples(task)
        examples = carve(examples, {"drawn": min(PER_TASK, len(examples))}, "drawn")
        [found] = study.open(router).measure(examples, RoutingVectors(experts))
        parts.append(found.table().assign(task=task))
    return pd.concat(parts, ignore_index=True)


def compute(study: Study) -> pd.DataFrame:
    """One row per panel and example: panel, task, id, x, y, and the panel's `separability`."""
    own = {task: study.router(task) for task in study.tasks}
    experts, first, seed = faithful_experts(study, own), study.tasks[0], study.schedule.seed
    panels = {
        "each task's router": own,
        f"{first}'s router": dict.fromkeys(study.tasks, own[first]),
        "base router": dict.fromkeys(study.tasks),
    }
    parts = []
    for panel, routers in panels.items():
        found = vectors(study, routers, experts)
        examples = len(found.drop_duplicates(["task", "id"]))
        places = routing_map(found, perplexity=min(30, examples // 4), seed=seed)
        if len(study.tasks) > 1:
            numbers = separability(found, seed=seed).iloc[0].to_dict()
        else:
            numbers = dict.fromkeys(COLUMNS[3:], float("nan"))
        parts.append(places.assign(panel=panel, **numbers))
    return pd.concat(parts, ignore_index=True)


if __name__ == "__main__":
    tasks = "swap,novel,consistent,hops"
    run(compute, item="figure4", table="clusters", tasks=tasks, about=__doc__)
