"""What the organism shows, measured: `python -m moe_lens.organism.measure --help`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import pandas as pd
from tqdm.auto import tqdm
from typer import Option

from moe_lens.causal.evaluation import answer_table, summarise
from moe_lens.commands import console
from moe_lens.data import Example, load_examples
from moe_lens.lens.delta import fingerprint, save_delta, weights_digest
from moe_lens.lens.lens import MoELens
from moe_lens.organism.questions import TASKS
from moe_lens.results import data_digest, provenance, read_if_made_by, read_table, write_table
from moe_lens.tuning import Schedule, router_parameters, tune_router

RATES = (5e-3, 2e-2)
SCHEDULE = Schedule(epochs=4, batch_size=16)


def task_table(lens: MoELens, *, seed: int | None, split: str, limit: int | None) -> pd.DataFrame:
    """One row per task: variant, seed of the router tuning (None for the base model), task, what `summarise` gives."""
    variant = "base" if seed is None else "router-tuned"
    rows = []
    for task in tqdm(TASKS, desc=variant, unit="task"):
        examples = load_examples(task, split=split, limit=limit)
        answers = answer_table(lens, examples, max_new_tokens=32 if task == "summary" else 8, progress=False)
        rows.append({"variant": variant, "seed": seed, "task": task, **summarise(answers)})
    return pd.DataFrame(rows).astype({"seed": float})


def tune_and_save(
    lens: MoELens, train: Sequence[Example], dev: Sequence[Example], *, seed: int, folder: Path, model: str
) -> None:
    """Tune the routers of `lens`; the folder gets them as a delta, and each rate's result as dev.parquet."""
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
    write_table(tuned.candidates.assign(seed=seed), folder / "dev.parquet", made_by)


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
    folders = {None: out / "base"} | {seed: out / f"router-{seed}" for seed in tuned_with}
    lens = MoELens.from_pretrained(model)
    train, dev = (load_examples("swap", split=part, limit=limit) for part in ("train", "dev"))
    answered = [example for task in TASKS for example in load_examples(task, split=split, limit=limit)]
    facts: dict[str, object] = {
        "weights": weights_digest(lens.module),
        "split": split,
        "rates": list(RATES),
        "schedule": repr(SCHEDULE),
    }
    facts |= {"tuned_on": data_digest(train), "dev": data_digest(dev)}
    tables = []
    for seed in (None, *tuned_with):
        file = folders[seed] / "measured.parquet"
        made_by = provenance(model=model, data=answered, seed=seed, facts=facts)
        table = read_if_made_by(file, made_by)
        if table is None:
            file.unlink(missing_ok=True)  # or else it could come to stand beside the routers of another run
            lens = MoELens.from_pretrained(model)
            if seed is not None:
                tune_and_save(lens, train, dev, seed=seed, folder=folders[seed], model=model)
            table = task_table(lens, seed=seed, split=split, limit=limit)
            write_table(table, file, made_by)
        tables.append(table)
    rates = [read_table(folders[seed] / "dev.parquet") for seed in tuned_with]
    table = pd.concat(tables)
    made_by = provenance(model=model, data=answered, facts=facts | {"seeds": seeds})
    write_table(table, out / "tasks.parquet", made_by)
    write_table(pd.concat(rates), out / "learning_rates.parquet", made_by)
    console.show(pd.concat(rates), title="Dev exact match on swap, by learning rate")
    console.show(table, title=f"{model}: every task, {split} split")
    print(f"written to {out}: tasks.parquet, learning_rates.parquet, base/, router-SEED/")


if __name__ == "__main__":
    console.run(main)
