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

from moe_lens import ExpertSet, MoELens, MoELensError, load_examples
from moe_lens.causal import single_expert_effects
from moe_lens.choosing import SCORES, Given, Ground, Models, Planted, Selection, Top, choices, mask, score_tables
from moe_lens.choosing.controls import CONTROL
from moe_lens.choosing.planted import has_planted, planted_experts
from moe_lens.commands import console
from moe_lens.metrics import auc, precision_at, rank_correlation
from moe_lens.results import provenance, write_table
from moe_lens.storage import try_folder

STRONGEST = "strongest"


def main(
    routers: Annotated[Path, Option(help="Folder with router-SEED/ from moe_lens.organism.measure.")],
    out: Annotated[Path, Option(help="Folder for scores.parquet, effects.parquet and masks.parquet.")],
    model: Annotated[str, Option(help="organism:planted or organism.")] = "organism:planted",
    size: Annotated[int, Option(min=1, help="Experts per layer that each score chooses.")] = 4,
    n_random: Annotated[int, Option(min=0, help="Random sets to compare with.")] = 20,
    limit: Annotated[int | None, Option(min=1, help="Use the first so many examples of each split only.")] = None,
) -> None:
    """Score all experts, compare the scores with both truths, and mask what each score chooses."""
    try_folder(out)
    train, dev, test = (load_examples("swap", split=split, limit=limit) for split in ("train", "dev", "test"))
    named = {folder.name.removeprefix("router-"): folder for folder in routers.glob("router-*")}
    deltas = {int(seed): folder for seed, folder in named.items() if seed.isdigit()}
    if not deltas:
        raise MoELensError(f"no router-SEED folders in {routers}; run python -m moe_lens.organism.measure first")
    planted = planted_experts(model) if has_planted(model) else None
    base, scores, effects, masks = MoELens.from_pretrained(model), [], [], []
    for seed, folder in sorted(deltas.items()):
        lens = MoELens.from_pretrained(model, delta=folder)
        tables = score_tables(SCORES.values(), Models.opened(base, lens), train)
        effect = single_expert_effects(lens, dev).assign(seed=seed)
        wanted: list[Selection] = [Top(score, size) for score in SCORES.values()]
        wanted.append(Given(ExpertSet.top(effect, size, score="effect"), called=STRONGEST))
        wanted += [] if planted is None else [Planted()]
        chosen = choices(wanted, Ground(lens.architecture, model, tables))
        rows = mask(lens, test, chosen, controls=n_random, max_new_tokens=8).rows.assign(seed=seed)
        for score in SCORES.values():
            table = tables[score.name]
            row = {"score": score.name, "about": score.about, "spearman": rank_correlation(table, effect)}
            if planted is not None:
                row |= {"auc": auc(table, planted), "precision": precision_at(table, planted, size)}
            [masked] = rows[rows["intervention"] == f"{score.name}:{size}"].to_dict("records")
            scores.append(row | masked)
        masks.append(rows[rows["family"].isin(["none", "chosen", "planted", CONTROL])])
        effects.append(effect)

    made_by = provenance(model=model, data=test, facts={"size": size, "seeds": sorted(deltas)})
    found = {"scores": pd.DataFrame(scores), "effects": pd.concat(effects), "masks": pd.concat(masks)}
    for name, table in found.items():
        write_table(table, out / f"{name}.parquet", made_by)
    kinds = found["masks"].assign(intervention=lambda rows: rows["intervention"].str.partition("#")[0])
    for key, table in {"score": found["scores"], "intervention": kinds}.items():
        mean = table.groupby(key, sort=False).mean(numeric_only=True).reset_index()
        shown = [name for name in mean if not name.endswith(("seed", "size", "_low", "_high", "_value", "_p"))]
        title = f"{model}, top {size} zero-masked, mean of {len(deltas)} tuned routers"
        console.show(mean, shown, title=title)


if __name__ == "__main__":
    console.run(main)
