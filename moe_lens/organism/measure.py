"""What the organism shows, measured: `python -m moe_lens.organism.measure --help`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import pandas as pd
from typer import Option

from moe_lens import console
from moe_lens.data import load_examples
from moe_lens.delta import fingerprint, save_delta
from moe_lens.evaluation import answer_table, summarise
from moe_lens.lens import MoELens
from moe_lens.organism.questions import TASKS
from moe_lens.results import provenance, write_table
from moe_lens.tuning import Schedule, router_parameters, tune_router

RATES = (5e-3, 2e-2)
SCHEDULE = Schedule(epochs=4, batch_size=16)


def task_rows(lens: MoELens, *, variant: str, seed: int | None, split: str, limit: int | None) -> list[dict]:
    """One row per task: variant, seed of the router tuning, task and what `summarise` gives."""
    rows = []
    for task in TASKS:
        examples = load_examples(task, split=split, limit=limit)
        answers = answer_table(lens, examples, max_new_tokens=32 if task == "summary" else 8, progress=False)
        rows.append({"variant": variant, "seed": seed, "task": task, **summarise(answers)})
    return rows


def main(
    model: Annotated[str, Option(help="organism or organism:planted, or the folder of one.")],
    out: Annotated[Path, Option(help="Folder for the table and, in router-SEED/, the tuned routers.")],
    seeds: Annotated[str, Option(help="Seeds of the router tuning.")] = "0,1,2",
    split: Annotated[str, Option(help="The split that is answered.")] = "test",
    limit: Annotated[int | None, Option(help="Use the first so many examples of each task and split only.")] = None,
) -> None:
    """Answer every task with the base model and after router tuning on `swap`, at the best learning rate on dev."""
    tuned_with = [int(seed) for seed in console.numbers(seeds, int, what="--seeds")]
    lens = MoELens.from_pretrained(model)
    train, dev = (load_examples("swap", split=part, limit=limit) for part in ("train", "dev"))
    rows = task_rows(lens, variant="base", seed=None, split=split, limit=limit)
    rates = []
    for seed in tuned_with:
        lens = MoELens.from_pretrained(model)
        base = fingerprint(lens.module, router_parameters(lens))
        tuned = tune_router(lens, train, dev, replace(SCHEDULE, seed=seed), learning_rates=RATES, max_new_tokens=8)
        facts = {
            "method": "router",
            "learning_rate": tuned.schedule.learning_rate,
            "epochs": SCHEDULE.epochs,
            "batch_size": SCHEDULE.batch_size,
        }
        made_by = provenance(model=model, data=train, seed=seed, facts=facts)
        save_delta(lens.module, tuned.parameters, out / f"router-{seed}", facts=made_by, fingerprint=base)
        rates.append(tuned.candidates.assign(seed=seed))
        rows += task_rows(lens, variant="router-tuned", seed=seed, split=split, limit=limit)
    table = pd.DataFrame(rows)
    answered = [example for task in TASKS for example in load_examples(task, split=split, limit=limit)]
    facts = {"split": split, "rates": list(RATES), "seeds": seeds, "tuned_on": len(train)}
    made_by = provenance(model=model, data=answered, facts=facts)
    write_table(table, out / "tasks.parquet", made_by)
    write_table(pd.concat(rates), out / "learning_rates.parquet", made_by)
    console.show(pd.concat(rates), title="Dev exact match on swap, by learning rate")
    console.show(table, title=f"{model}: every task, {split} split")
    print(f"written to {out}: tasks.parquet, learning_rates.parquet, router-SEED/")


if __name__ == "__main__":
    console.run(main)
