"""What makes an untuned model read its context? Biased experts, vectors, decoding and their pairs, on the organism.

Strengths are chosen on dev: the highest EM on swap and novel of those that leave closed_book .95 of its own. Test is
asked once, with what dev chose, random ones like it, and tuned routers for reference.

    python analyses/strengthening.py --model organism:planted --experts contrast:4 --experts planted \
        --routers RUN/planted --out RUN/strengthening
"""

from pathlib import Path
from typing import Annotated

import pandas as pd
from typer import Option

from moe_lens import MoELens, load_examples
from moe_lens.causal import evaluate
from moe_lens.choosing import Ground, Models, choices, parse, score_tables
from moe_lens.choosing.selection import scores_of
from moe_lens.commands import console
from moe_lens.organism.tuning_effects import tuned_routers
from moe_lens.paper.finders import ALSO, SPARED, TARGETS
from moe_lens.paper.result_tables import dose_curves, strengthening_table
from moe_lens.paper.strengthening import Strengthening, biased, decodings, pairs, trained_biases, vectors
from moe_lens.results import claim, provenance, write_table
from moe_lens.storage import try_folder
from moe_lens.tuning import Schedule


def main(
    experts: Annotated[list[str], Option(help="Sets to bias, as --experts of moe_lens.intervene (several times).")],
    routers: Annotated[Path, Option(help="Folder with router-SEED/ from moe_lens.organism.measure, for reference.")],
    out: Annotated[Path, Option(help="Folder for dev.parquet, test.parquet and tuned.parquet.")],
    model: Annotated[str, Option(help="organism:planted or organism.")] = "organism:planted",
    n_random: Annotated[int, Option(min=2, help="Random ones like each.")] = 5,
    train: Annotated[int, Option(min=1, help="Examples for scores, vectors and trained biases.")] = 200,
    dev: Annotated[int, Option(min=1, help="Dev questions of each task to choose by.")] = 96,
    test: Annotated[int, Option(min=1, help="Test questions of swap.")] = 192,
    other: Annotated[int, Option(min=1, help="Test questions of each other task.")] = 96,
    seeds: Annotated[int, Option(min=1, help="Trainings of the bias.")] = 1,
    rate: Annotated[float, Option(help="Learning rate of the trained bias.")] = 0.3,
) -> None:
    """Choose a strength of each way on dev, and answer test with it; goes on where it was stopped."""
    try_folder(out)
    study = Strengthening(model, out, {"train": train, "dev": dev, "test": test, "other": other})
    made_by = provenance(model=model, facts={"experts": experts, "limits": study.limits, "n_random": n_random})
    claim(out, provenance(model=model))
    selections = [one for text in experts for one in parse(text)]
    opened, asked = Models.opened(study.lens, study.lens), study.examples("swap", "train")
    tables = score_tables(scores_of(selections), opened, asked, load=lambda task: load_examples(task, split="train"))
    sets = choices(selections, Ground(study.lens.architecture, model, tables))
    points = [point for one in sets for point in biased(one.name, one.experts)]
    schedule = Schedule(epochs=2, batch_size=8)
    for seed in range(seeds):
        points += trained_biases(study.trained_bias(seed, schedule, rate), f"trained bias #{seed}")
    points += [*vectors(study.lens, asked), *decodings()]
    table, chosen = study.chosen(points)
    both, more = study.chosen(pairs(table, points))
    console.say("chosen on dev: " + "; ".join(point.name for point in [*chosen, *more]))
    tested, parts = study.test([*chosen, *more], n_random), []
    for seed, folder in tuned_routers(routers).items():
        lens = MoELens.from_pretrained(model, delta=folder)
        for task in (*TARGETS, *SPARED, *ALSO):
            tokens, questions = 32 if task == "summary" else 8, study.examples(task, "test")
            answers = evaluate(lens, questions, max_new_tokens=tokens, batch_size=96).answers
            parts.append(answers.assign(task=task, seed=seed))
    tables = {"dev": pd.concat([table, both], ignore_index=True), "test": tested, "tuned": pd.concat(parts)}
    for name, own in tables.items():
        write_table(own, out / f"{name}.parquet", made_by)
    print(dose_curves(tables["dev"]), strengthening_table(tested, tables["tuned"]), sep="\n\n")


if __name__ == "__main__":
    console.run(main)
