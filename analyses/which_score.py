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

from moe_lens import MoELens, MoELensError, load_examples
from moe_lens.choosing import SCORES, Models, score_named
from moe_lens.commands import console
from moe_lens.paper.finders import Measured, compared
from moe_lens.results import provenance, write_table
from moe_lens.storage import try_folder


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
    scores = [score_named(name) for name in score or SCORES]
    train, dev, test = (load_examples("swap", split=split, limit=limit) for split in ("train", "dev", "test"))
    named = {folder.name.removeprefix("router-"): folder for folder in routers.glob("router-*")}
    deltas = {int(seed): folder for seed, folder in named.items() if seed.isdigit()}
    if not deltas:
        raise MoELensError(f"no router-SEED folders in {routers}; run python -m moe_lens.organism.measure first")
    base, parts = MoELens.from_pretrained(model), []
    of_base = Measured.of([one for one in scores if not one.needs_tuned], Models.opened(base, base), train)
    for seed, folder in sorted(deltas.items()):
        lens = MoELens.from_pretrained(model, delta=folder)
        of_tuned = Measured.of([one for one in scores if one.needs_tuned], Models.opened(base, lens), train)
        both = of_base.and_also(of_tuned)
        found = compared(lens, model, scores, both, dev, test, size=size, controls=n_random)
        parts.append({name: table.assign(seed=seed) for name, table in found.items()})

    made_by = provenance(model=model, data=test, facts={"size": size, "seeds": sorted(deltas)})
    tables = {name: pd.concat([part[name] for part in parts]) for name in parts[0]}
    for name, table in tables.items():
        write_table(table, out / f"{name}.parquet", made_by)
    kinds = tables["masks"].assign(intervention=lambda rows: rows["intervention"].str.partition("#")[0])
    for key, table in {"score": tables["scores"], "intervention": kinds}.items():
        mean = table.groupby(key, sort=False).mean(numeric_only=True).reset_index()
        shown = [name for name in mean if not name.endswith(("seed", "size", "_value", "_p"))]
        shown = [name for name in shown if name.startswith("spearman") or not name.endswith(("_low", "_high"))]
        title = f"{model}, top {size} zero-masked, mean of {len(deltas)} tuned routers"
        console.show(mean, shown, title=title)


if __name__ == "__main__":
    console.run(main)
