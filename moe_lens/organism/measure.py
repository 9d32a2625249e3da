"""What the organism shows, measured: `python -m moe_lens.organism.measure --help`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import pandas as pd
from tqdm.auto import tqdm
from typer import Option

from moe_lens import console
from moe_lens.data import Example, load_examples
from moe_lens.delta import fingerprint, save_delta, weights_digest
from moe_lens.evaluation import answer_table, summarise
from moe_lens.lens import MoELens
from moe_lens.organism.questions import TASKS
from moe_lens.results import provenance, read_if_made_by, read_table, write_table
from moe_lens.tuning import Schedule, router_parameters, tune_router

RATES = (5e-3, 2e-2)
SCHEDULE = Schedule(epochs=4, batch_size=16)


def task_table(lens: MoELens, *, variant: str, seed: int | None, split: str, limit: int | None) -> pd.DataFrame:
    """One row per task: variant, seed of the router tuning, task and what `summarise` gives."""
    rows = []
    for task in tqdm(TASKS, desc=variant if seed is None else f"{variant}, seed {seed}", unit="task"):
        examples = load_examples(task, split=split, limit=limit)
        answers = answer_table(lens, examples, max_new_tokens=32 if task == "summary" else 8, progress=False)
        rows.append({"variant": variant, "seed": seed, "task": task, **summarise(answers)})
    return pd.DataFrame(rows).astype({"seed": float})  # missing for the base model


def tune(lens: MoELens, train: list[Example], dev: list[Example], seed: int, folder: Path, model: str) -> None:
    """Tune the routers of `lens`; the folder gets them as a delta, and learning_rates.parquet."""
    base = fingerprint(lens.module, router_parameters(lens))
    tuned = tune_router(lens, train, dev, replace(SCHEDULE, seed=seed), learning_rates=RATES, max_new_tokens=8)
    facts = {
        "method": "router",
        "learning_rate": tuned.schedule.learning_rate,
        "epochs": SCHEDULE.epochs,
        "batch_size": SCHEDULE.batch_size,
    }
    made_by = provenance(model=model, data=train, seed=seed, facts=facts)
    save_delta(lens.module, tuned.parameters, folder, facts=made_by, fingerprint=base)
    write_table(tuned.candidates.assign(seed=seed), folder / "learning_rates.parquet", made_by)


def main(
    model: Annotated[str, Option(help="organism or organism:planted, or the folder of one.")],
    out: Annotated[Path, Option(help="Folder for the tables and, in router-SEED/, the tuned routers.")],
    seeds: Annotated[str, Option(help="Seeds of the router tuning.")] = "0,1,2",
    split: Annotated[str, Option(help="The split that is answered.")] = "test",
    limit: Annotated[int | None, Option(help="Use the first so many examples of each task and split only.")] = None,
) -> None:
    """Answer every task with the base model and after router tuning on `swap`, at the best learning rate on dev.

    The same command goes on where it was stopped: what each seed gave is kept in its folder.
    """
    tuned_with = [int(seed) for seed in console.numbers(seeds, int, what="--seeds")]
    lens = MoELens.from_pretrained(model)
    train, dev = (load_examples("swap", split=part, limit=limit) for part in ("train", "dev"))
    answered = [example for task in TASKS for example in load_examples(task, split=split, limit=limit)]
    facts = {"weights": weights_digest(lens.module), "split": split, "rates": list(RATES), "tuned_on": len(train)}
    tables, rates = [], []
    for seed in (None, *tuned_with):
        folder = out / ("base" if seed is None else f"router-{seed}")
        made_by = provenance(model=model, data=answered, seed=seed, facts=facts)
        table = read_if_made_by(folder / "tasks.parquet", made_by)
        if table is None:
            if seed is not None:
                lens = MoELens.from_pretrained(model)
                tune(lens, train, dev, seed, folder, model)
            variant = "base" if seed is None else "router-tuned"
            table = task_table(lens, variant=variant, seed=seed, split=split, limit=limit)
            write_table(table, folder / "tasks.parquet", made_by)
        tables.append(table)
        if seed is not None:
            rates.append(read_table(folder / "learning_rates.parquet"))
    table = pd.concat(tables)
    made_by = provenance(model=model, data=answered, facts=facts | {"seeds": seeds})
    write_table(table, out / "tasks.parquet", made_by)
    write_table(pd.concat(rates), out / "learning_rates.parquet", made_by)
    console.show(pd.concat(rates), title="Dev exact match on swap, by learning rate")
    console.show(table, title=f"{model}: every task, {split} split")
    print(f"written to {out}: tasks.parquet, learning_rates.parquet, base/, router-SEED/")


if __name__ == "__main__":
    console.run(main)
