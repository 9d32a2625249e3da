"""Figure 1: one question, and what the model answers with each expert of each layer alone in that layer.

    python analyses/figure1_two_experts.py --model organism --data swap --out runs/paper

Alone: the router of that layer selects that expert and no other for every token, with the sum of weights that the token
would have had; all other layers are as they are. Shown is the first test question of which, in one layer, one expert
alone gives the context's answer and another what memory says. A case is picked for what it shows: how often either
happens over all questions tried is in the columns context_share and memory_share.
"""

import pandas as pd

from moe_lens.causal import evaluate
from moe_lens.errors import MoELensError
from moe_lens.paper.lone_experts import alone, case_of, whose
from moe_lens.paper.script import run
from moe_lens.paper.study import Study

TRIED = 12
"""Test questions that are answered by every expert alone; the case is the first of them that shows both."""


def compute(study: Study) -> pd.DataFrame:
    """One row per layer and expert, of one question: prediction, says ("context", "memory", "other") and `chosen`.

    And as_it_is, what the unchanged model answers; question, answer and memory; context_share and memory_share.
    """
    examples = [example for example in study.examples(study.tasks[0]) if example.memory][:TRIED]
    if not examples:
        raise MoELensError(
            f"{study.tasks[0]} has no example with an original_answer; take data such as swap or nq-swap"
        )
    architecture = study.architecture
    cells = {(layer, e): alone(layer, e) for layer in architecture.moe_layers for e in range(architecture.n_experts)}
    named = {f"{layer}:{expert}": several for (layer, expert), several in cells.items()}
    found = evaluate(
        study.open(), examples, named, max_new_tokens=study.max_new_tokens, seed=study.schedule.seed
    ).answers
    by_id = {example.id: example for example in examples}
    found["says"] = [whose(said, by_id[name]) for said, name in zip(found["prediction"], found["id"], strict=True)]
    changed = found[found["intervention"] != "none"]
    places = changed["intervention"].str.split(":", expand=True).astype(int)
    changed = changed.assign(layer=places[0], expert=places[1])
    case, layer = case_of(changed, [example.id for example in examples])
    shown, own = changed[changed["id"] == case], by_id[case]
    pair = {
        shown[(shown["layer"] == layer) & (shown["says"] == says)]["expert"].min() for says in ("context", "memory")
    }
    return shown.assign(
        chosen=(shown["layer"] == layer) & shown["expert"].isin(pair),
        as_it_is=found[(found["intervention"] == "none") & (found["id"] == case)]["prediction"].iloc[0],
        question=own.question,
        answer=own.answers[0],
        memory=own.memory[0],
        context_share=(changed["says"] == "context").mean(),
        memory_share=(changed["says"] == "memory").mean(),
    )[[*COLUMNS]].reset_index(drop=True)


COLUMNS = (
    "id", "layer", "expert", "prediction", "says", "chosen", "as_it_is", "question", "answer", "memory",
    "context_share", "memory_share",
)  # fmt: skip


if __name__ == "__main__":
    run(
        compute,
        item="figure1",
        table="two_experts",
        tasks="swap",
        about=__doc__,
        columns=("layer", "expert", "prediction", "says", "chosen"),
    )
