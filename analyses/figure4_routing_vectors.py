"""Figure 4: t-SNE of the activation rates of the context-faithful experts, an example of each task as a mark.

python analyses/figure4_routing_vectors.py --model organism --data swap,novel,consistent,hops --out runs/paper
"""

import pandas as pd
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from moe_lens import ExpertSet, ExpertUsage
from moe_lens.plots import clusters_figure
from moe_lens.statistics import RoutingVectors
from moe_lens.study import Study, run

PER_TASK = 1000


def compute(study: Study) -> pd.DataFrame:
    """One row per example: task, id, x, y; silhouette and 5-fold nearest-neighbour accuracy of the vectors themselves.

    Each task's model has routers tuned on that task and its own context-faithful experts, as in the paper; a vector
    holds the rates of all experts that are context-faithful for any task.
    """
    lenses = {task: study.open(study.router(task)) for task in study.tasks}
    faithful = ExpertSet()
    for task, lens in lenses.items():
        [usage] = lens.measure(study.examples(task, "train"), ExpertUsage(), batch_size=study.batch_size)
        faithful |= ExpertSet.top(usage.table(), lens.architecture.top_k)
    parts = []
    for task, lens in lenses.items():
        examples = study.examples(task)[:PER_TASK]
        [vectors] = lens.measure(examples, RoutingVectors(faithful), batch_size=study.batch_size)
        parts.append(vectors.table().pivot(index="id", columns=["layer", "expert"], values="rate").assign(task=task))
    table = pd.concat(parts)
    tasks = table.pop("task")
    values = table.to_numpy()
    seed = study.schedule.seed
    places = TSNE(perplexity=min(30, len(values) // 4), random_state=seed).fit_transform(values)
    several = tasks.nunique() > 1
    return pd.DataFrame({
        "task": tasks.to_numpy(),
        "id": table.index,
        "x": places[:, 0],
        "y": places[:, 1],
        "silhouette": silhouette_score(values, tasks) if several else None,
        "knn_accuracy": cross_val_score(KNeighborsClassifier(), values, tasks).mean() if several else None,
    })


if __name__ == "__main__":
    tasks = "swap,novel,consistent,hops"
    run(compute, clusters_figure, item="figure4", table="clusters", tasks=tasks, about=__doc__)
