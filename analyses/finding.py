"""Which finder names the experts that read the context? Every score, and learned sets, on the model organism.

Against the planted truth, the exact effect of each single expert, matched random sets and other tasks. Where a score
counts is chosen on dev; the test questions are asked once, with what dev chose.

    python -m moe_lens.organism.measure --model organism:planted --out RUN/planted
    python analyses/finding.py --model organism:planted --routers RUN/planted --out RUN/finding
"""

from pathlib import Path
from typing import Annotated

import pandas as pd
from typer import Option

from moe_lens import MoELens
from moe_lens.choosing import SCORES, score_named
from moe_lens.commands import console
from moe_lens.organism.tuning_effects import tuned_routers
from moe_lens.paper.finders import Finding, Sizes, best_of_kinds
from moe_lens.paper.result_tables import agreement_table, left_table, mask_table
from moe_lens.results import claim, provenance, write_table
from moe_lens.storage import try_folder, write_bytes

LEFT_OUT = ("effect", "effect-tuned")
"""The exact effects stand in the table as `strongest`, measured on dev questions."""


def main(
    routers: Annotated[Path, Option(help="Folder with router-SEED/ from moe_lens.organism.measure.")],
    out: Annotated[Path, Option(help="Folder for dev.parquet, answers.parquet and verdicts.parquet.")],
    model: Annotated[str, Option(help="organism:planted or organism.")] = "organism:planted",
    size: Annotated[int, Option(min=1, help="Experts per layer that each finder names.")] = 4,
    n_random: Annotated[int, Option(min=2, help="Random sets to compare with.")] = 10,
    scored: Annotated[int, Option(min=2, help="Train examples of each task to find by.")] = 240,
    dev: Annotated[int, Option(min=1, help="Dev questions to choose by.")] = 96,
    test: Annotated[int, Option(min=1, help="Test questions of swap.")] = 192,
    other: Annotated[int, Option(min=1, help="Test questions of each other task.")] = 96,
    searches: Annotated[int, Option(min=1, help="Searches for each learned set.")] = 3,
    score: Annotated[list[str] | None, Option(help="Compare this score only (several times); default all.")] = None,
) -> None:
    """Find experts in every way, see how they agree with both truths, and mask them; goes on where it was stopped."""
    try_folder(out)
    names = score or [*(name for name in SCORES if name not in LEFT_OUT), "contrast(novel;swap)"]
    sizes = Sizes(size, n_random, scored, dev, test, other, searches)
    study = Finding(model, tuned_routers(routers), out, sizes, [score_named(name) for name in names])
    made_by = provenance(model=model, facts={"sizes": repr(sizes), "scores": names, "seeds": sorted(study.deltas)})
    claim(out, provenance(model=model, facts={"size": size}))  # more routers and questions go on from what is there
    of_base, rows, found = study.of_base(), [], {}
    for seed, folder in study.deltas.items():
        lens = MoELens.from_pretrained(model, delta=folder)
        found[seed] = [*of_base, *study.of_tuned(lens, seed)]
        rows.append(study.dev(lens, seed, found[seed]))
    table = pd.concat(rows, ignore_index=True)
    wanted = best_of_kinds(table)
    console.say(f"chosen on dev, to be asked on test: {', '.join(wanted)}")
    for one in found[min(found)]:
        if one.name in wanted and (one in of_base or one.name == "planted"):
            write_bytes(out / "sets" / f"{one.choice.family.partition(',')[0]}.json", one.experts.to_json().encode())
    tests = []
    for seed, folder in study.deltas.items():
        chosen = [one.choice for one in found[seed] if one.name in wanted]
        tests.append(study.test(MoELens.from_pretrained(model, delta=folder), seed, chosen))
    tables = {name: pd.concat([one[name] for one in tests], ignore_index=True) for name in tests[0]}
    tables |= {"dev": table, "left": left_table(tables["answers"], model)}
    for name, own in tables.items():
        write_table(own, out / f"{name}.parquet", made_by)
    print(agreement_table(table), mask_table(table, tables["answers"], tables["verdicts"]), sep="\n\n")


if __name__ == "__main__":
    console.run(main)
