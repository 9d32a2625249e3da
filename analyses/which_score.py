"""Which score finds the experts that read the context? Every score against two truths, on the model organism.

The planted truth is the experts that pretraining routed reading to; the measured one the causal
effect of each single expert of the router-tuned model.

    python -m moe_lens.organism.measure --model organism:planted --out RUN/planted
    python analyses/which_score.py --model organism:planted --routers RUN/planted --out RUN/which_score
"""

from pathlib import Path
from time import process_time
from typing import Annotated

import pandas as pd
from typer import Option

from moe_lens import Example, ExpertSet, MoELens, MoELensError, load_examples
from moe_lens.causal import single_expert_effects
from moe_lens.choosing import (
    SCORES,
    Given,
    Ground,
    Models,
    Planted,
    Score,
    Selection,
    Top,
    choices,
    mask,
    score_named,
    score_tables,
)
from moe_lens.choosing.controls import CONTROL
from moe_lens.choosing.planted import has_planted, planted_experts
from moe_lens.commands import console
from moe_lens.metrics import auc, precision_at, rank_correlation_interval
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
    score: Annotated[
        list[str] | None, Option(help="Compare this one only (several times), such as ce or contrast(novel;swap).")
    ] = None,
) -> None:
    """Score all experts, compare the scores with both truths, and mask what each score chooses."""
    try_folder(out)
    compared = [score_named(name) for name in score or SCORES]
    train, dev, test = (load_examples("swap", split=split, limit=limit) for split in ("train", "dev", "test"))
    named = {folder.name.removeprefix("router-"): folder for folder in routers.glob("router-*")}
    deltas = {int(seed): folder for seed, folder in named.items() if seed.isdigit()}
    if not deltas:
        raise MoELensError(f"no router-SEED folders in {routers}; run python -m moe_lens.organism.measure first")
    planted = planted_experts(model) if has_planted(model) else None
    base, scores, effects, masks = MoELens.from_pretrained(model), [], [], []
    of_base = _measured([one for one in compared if not one.needs_tuned], Models.opened(base, base), train)
    for seed, folder in sorted(deltas.items()):
        lens = MoELens.from_pretrained(model, delta=folder)
        of_tuned = _measured([one for one in compared if one.needs_tuned], Models.opened(base, lens), train)
        tables, seconds = of_base[0] | of_tuned[0], of_base[1] | of_tuned[1]
        effect = single_expert_effects(lens, dev).assign(seed=seed)
        wanted: list[Selection] = [Top(one, size) for one in compared]
        wanted.append(Given(ExpertSet.top(effect, size, score="effect"), called=STRONGEST))
        wanted += [] if planted is None else [Planted()]
        chosen = choices(wanted, Ground(lens.architecture, model, tables))
        rows = mask(lens, test, chosen, controls=n_random, max_new_tokens=8).rows.assign(seed=seed)
        for one in compared:
            table = tables[one.name]
            exact = rank_correlation_interval(table, effect)
            row = {"score": one.name, "about": one.about, "seconds": seconds[one.name], "spearman": exact.mean}
            row |= {"spearman_low": exact.low, "spearman_high": exact.high}
            if planted is not None:
                row |= {"auc": auc(table, planted), "precision": precision_at(table, planted, size)}
            [masked] = rows[rows["intervention"] == f"{one.name}:{size}"].to_dict("records")
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
        shown = [name for name in mean if not name.endswith(("seed", "size", "_value", "_p"))]
        shown = [name for name in shown if name.startswith("spearman") or not name.endswith(("_low", "_high"))]
        title = f"{model}, top {size} zero-masked, mean of {len(deltas)} tuned routers"
        console.show(mean, shown, title=title)


def _measured(
    compared: list[Score], models: Models, train: list[Example]
) -> tuple[dict[str, pd.DataFrame], dict[str, float]]:
    """The table of every score, and the CPU seconds that it takes alone."""
    tables, seconds = {}, {}
    for one in compared:
        before = process_time()
        tables |= score_tables([one], models, train)
        seconds[one.name] = process_time() - before
    return tables, seconds


if __name__ == "__main__":
    console.run(main)
