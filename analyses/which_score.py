"""Which score finds the experts that read the context? Every score against two truths, on the model organism.

The planted truth is the experts that pretraining routed reading to; the measured one the causal
effect of each single expert of the router-tuned model.

    python -m moe_lens.organism.measure --model organism:planted --out RUN/planted
    python analyses/which_score.py --model organism:planted --routers RUN/planted --out RUN/which_score
"""

from pathlib import Path
from typing import Annotated

import pandas as pd
from typer import Option

from moe_lens import ExpertSet, MoELens, MoELensError, Zero, load_examples
from moe_lens.causal.evaluation import answer_table, summarise
from moe_lens.causal.sweep import single_expert_effects
from moe_lens.choosing.scores import SCORES, measure_usage, score_table
from moe_lens.commands import console
from moe_lens.metrics import auc, precision_at, rank_correlation
from moe_lens.organism import has_planted, planted_experts
from moe_lens.results import provenance, write_table


def main(
    routers: Annotated[Path, Option(help="Folder with router-SEED/ from moe_lens.organism.measure.")],
    out: Annotated[Path, Option(help="Folder for scores.parquet, effects.parquet and masks.parquet.")],
    model: Annotated[str, Option(help="organism:planted or organism.")] = "organism:planted",
    size: Annotated[int, Option(help="Experts per layer that each score chooses.")] = 4,
    n_random: Annotated[int, Option(help="Random sets to compare with.")] = 20,
    limit: Annotated[int | None, Option(help="Use the first so many examples of each split only.")] = None,
) -> None:
    """Score all experts, compare the scores with both truths, and mask what each score chooses."""
    train, dev, test = (load_examples("swap", split=split, limit=limit) for split in ("train", "dev", "test"))
    deltas = {int(folder.name.removeprefix("router-")): folder for folder in routers.glob("router-*")}
    if not deltas:
        raise MoELensError(f"no router-SEED folders in {routers}; run python -m moe_lens.organism.measure first")
    base = measure_usage(MoELens.from_pretrained(model), train, SCORES.values())
    planted = planted_experts(model) if has_planted(model) else None
    scores, effects, masks = [], [], []
    for seed, folder in sorted(deltas.items()):
        lens = MoELens.from_pretrained(model, delta=folder)
        tuned = measure_usage(lens, train, SCORES.values())
        effect = single_expert_effects(lens, dev).assign(seed=seed)
        unmasked = answer_table(lens, test, max_new_tokens=8)

        def masked(experts: ExpertSet, lens: MoELens = lens, unmasked: pd.DataFrame = unmasked) -> dict:
            with lens.intervene(Zero(experts)):
                answers = answer_table(lens, test, max_new_tokens=8, progress=False)
            return summarise(answers, unmasked)

        for score in SCORES.values():
            table = score_table(score, base=base, tuned=tuned)
            row = {"seed": seed, "score": score.name, "about": score.about, "spearman": rank_correlation(table, effect)}
            if planted is not None:
                row |= {"auc": auc(table, planted), "precision": precision_at(table, planted, size)}
            scores.append(row | masked(ExpertSet.top(table, size)))
        strongest = ExpertSet.top(effect, size, score="effect")
        sets = {"strongest": strongest} | ({} if planted is None else {"planted": planted})
        n_experts = lens.architecture.n_experts
        sets |= {f"random#{i}": ExpertSet.random_like(strongest, i, n_experts=n_experts) for i in range(n_random)}
        masks += [{"seed": seed, "intervention": "none", **summarise(unmasked)}]
        masks += [{"seed": seed, "intervention": name, **masked(experts)} for name, experts in sets.items()]
        effects.append(effect)

    made_by = provenance(model=model, data=test, facts={"size": size, "seeds": sorted(deltas)})
    tables = {"scores": pd.DataFrame(scores), "effects": pd.concat(effects), "masks": pd.DataFrame(masks)}
    for name, table in tables.items():
        write_table(table, out / f"{name}.parquet", made_by)
    kinds = tables["masks"].assign(intervention=lambda rows: rows["intervention"].str.partition("#")[0])
    shown = {"score": tables["scores"], "intervention": kinds}
    for key, table in shown.items():
        mean = table.groupby(key, sort=False).mean(numeric_only=True).reset_index()
        title = f"{model}, top {size} zero-masked, mean of {len(deltas)} tuned routers"
        console.show(mean.drop(columns=["seed", "em_low", "em_high", "p_value"]), title=title)


if __name__ == "__main__":
    console.run(main)
