"""Which score finds the experts that read the context? Every score against two truths, on the model organism.

The planted truth is the experts that pretraining routed context reading to. The measured truth, which nobody planted,
is the causal effect of each single expert of the router-tuned model. Run `python -m moe_lens.organism.measure` first:
it writes the tuned routers that this script reads.

    python -m moe_lens.organism.measure --model organism:planted --out RUN/planted
    python analyses/which_score.py --model organism:planted --routers RUN/planted --out RUN/which_score
"""

from pathlib import Path
from typing import Annotated

import pandas as pd
from typer import Option

from moe_lens import console
from moe_lens.ablation import single_expert_effects
from moe_lens.data import load_examples
from moe_lens.errors import MoELensError
from moe_lens.evaluation import answer_table, summarise
from moe_lens.experts import ExpertSet
from moe_lens.interventions import Zero
from moe_lens.lens import MoELens
from moe_lens.metrics import auc, precision_at, rank_correlation
from moe_lens.organism import planted_experts
from moe_lens.results import provenance, write_table
from moe_lens.scores import SCORES, measure_usage, score_table


def masked_row(lens: MoELens, examples: list, experts: ExpertSet, unmasked: pd.DataFrame) -> dict:
    """How the answers change when `experts` are zero-masked."""
    with lens.intervene(Zero(experts)):
        answers = answer_table(lens, examples, max_new_tokens=8, progress=False)
    summary = summarise(answers, unmasked)
    drop = unmasked["em"] - answers["em"]
    interval = summarise(answers.assign(em=drop))
    return {key: summary[key] for key in ("em", "em_low", "em_high", "p_value")} | {
        "em_drop": interval["em"],
        "em_drop_low": interval["em_low"],
        "em_drop_high": interval["em_high"],
    }


def main(
    model: Annotated[str, Option(help="organism:planted or organism.")],
    routers: Annotated[Path, Option(help="Folder with router-SEED/ from moe_lens.organism.measure.")],
    out: Annotated[Path, Option(help="Folder for scores.parquet, effects.parquet and masks.parquet.")],
    size: Annotated[int, Option(help="Experts per layer that each score chooses.")] = 4,
    n_random: Annotated[int, Option(help="Random sets to compare with.")] = 20,
    limit: Annotated[int | None, Option(help="Use the first so many examples only.")] = None,
) -> None:
    """Score all experts, compare the scores with both truths, and mask what each score chooses."""
    train, test = load_examples("swap", split="train", limit=limit), load_examples("swap", limit=limit)
    dev = load_examples("swap", split="dev", limit=limit)
    deltas = sorted(routers.glob("router-*"))
    if not deltas:
        raise MoELensError(f"no router-SEED folders in {routers}; run python -m moe_lens.organism.measure first")
    base = measure_usage(MoELens.from_pretrained(model), train, SCORES.values())
    planted = planted_experts(model) if model.endswith("planted") else None
    scores, effects, masks = [], [], []
    for folder in deltas:
        seed = int(folder.name.rpartition("-")[2])
        lens = MoELens.from_pretrained(model, delta=folder)
        tuned = measure_usage(lens, train, SCORES.values())
        effect = single_expert_effects(lens, dev)
        effects.append(effect.assign(seed=seed))
        unmasked = answer_table(lens, test, max_new_tokens=8, progress=False)
        n_experts = lens.architecture.n_experts
        by_effect = ExpertSet.top(effect, size, score="effect")
        named = {"largest single effects": by_effect} | ({} if planted is None else {"planted": planted})
        named |= {f"random#{i}": ExpertSet.random_like(by_effect, i, n_experts=n_experts) for i in range(n_random)}
        masks += [
            {
                "seed": seed,
                "intervention": name,
                "unmasked": unmasked["em"].mean(),
                **masked_row(lens, test, experts, unmasked),
            }
            for name, experts in named.items()
        ]
        for score in SCORES.values():
            table = score_table(score, base=base, tuned=tuned)
            row = {
                "seed": seed,
                "score": score.name,
                "about": score.about,
                "spearman": rank_correlation(table, effect),
            }
            if planted is not None:
                row |= {"auc": auc(table, planted), "precision": precision_at(table, planted, size)}
            scores.append(row | masked_row(lens, test, ExpertSet.top(table, size), unmasked))
    made_by = provenance(
        model=model, delta=routers / deltas[0].name, data=test, facts={"size": size, "seeds": len(deltas)}
    )
    for name, rows in (
        ("scores", pd.DataFrame(scores)),
        ("effects", pd.concat(effects)),
        ("masks", pd.DataFrame(masks)),
    ):
        write_table(rows, out / f"{name}.parquet", made_by)
    table = pd.DataFrame(scores)
    mean = table.groupby("score", sort=False).mean(numeric_only=True).drop(columns="seed").reset_index()
    console.show(mean, title=f"{model}: each score against the truth, mean of {len(deltas)} seeds, top {size} masked")
    kinds = pd.DataFrame(masks).assign(intervention=lambda rows: rows["intervention"].str.partition("#")[0])
    console.show(
        kinds.groupby("intervention", sort=False).mean(numeric_only=True).drop(columns="seed").reset_index(),
        title="Other sets masked, means",
    )


if __name__ == "__main__":
    console.run(main)
