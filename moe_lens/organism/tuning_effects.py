"""What router tuning changes in the organism: its tasks answered in words before it and after it, seed by seed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from moe_lens.causal.evaluation import answer_table, summarise
from moe_lens.commands import console
from moe_lens.data import Example, load_examples
from moe_lens.errors import MoELensError
from moe_lens.lens.delta import weights_digest
from moe_lens.lens.lens import MoELens
from moe_lens.organism.questions import ANSWERED
from moe_lens.progress import progress_bar
from moe_lens.results import claim, data_digest, kept, provenance, read_table, write_table
from moe_lens.storage import try_folder
from moe_lens.tuning import Schedule, TuneRouters, save_trained, tune

RATES = (5e-3, 2e-2)
SCHEDULE = Schedule(epochs=4, batch_size=16)


def tuned_routers(folder: Path) -> dict[int, Path]:
    """The tuned routers that `measure_organism` left in a folder, by seed; MoELensError where there are none."""
    named = {path.name.removeprefix("router-"): path for path in folder.glob("router-*")}
    found = {int(seed): path for seed, path in named.items() if seed.isdigit()}
    if not found:
        raise MoELensError(f"no router-SEED folders in {folder}; run python -m moe_lens.organism.measure first")
    return dict(sorted(found.items()))


def task_table(lens: MoELens, *, seed: int | None, split: str, limit: int | None) -> pd.DataFrame:
    """One row per task: variant, seed of the router tuning (None for the base model), task, what `summarise` gives."""
    variant = "base" if seed is None else "router-tuned"
    rows = []
    for task in progress_bar(ANSWERED, desc=variant, unit="task"):
        examples = load_examples(task, split=split, limit=limit)
        answers = answer_table(lens, examples, max_new_tokens=32 if task == "summary" else 8, progress=False)
        rows.append({"variant": variant, "seed": seed, "task": task, **summarise(answers)})
    return pd.DataFrame(rows).astype({"seed": float})


def tune_and_save(
    lens: MoELens, train: Sequence[Example], dev: Sequence[Example], *, seed: int, folder: Path, model: str
) -> None:
    """Tune the routers of `lens`; the folder gets them as a delta, and each rate's result as dev.parquet."""
    tuned = tune(lens, train, dev, TuneRouters(), replace(SCHEDULE, seed=seed), learning_rates=RATES, max_new_tokens=8)
    facts = {
        "method": "router",
        "learning_rate": tuned.schedule.learning_rate,
        "epochs": SCHEDULE.epochs,
        "batch_size": SCHEDULE.batch_size,
    }
    made_by = provenance(model=model, data=train, seed=seed, facts=facts)
    save_trained(lens.module, tuned.trained, folder, facts=made_by)
    write_table(tuned.candidates.assign(seed=seed), folder / "dev.parquet", made_by)


def measure_organism(model: str, out: Path, *, seeds: Sequence[int], split: str, limit: int | None) -> None:
    """Every task's answers by the base model and after router tuning on `swap` with each seed, as tables in `out`.

    What each seed gave is kept in its folder, and not made again by the same call.
    """
    try_folder(out)
    folders = {None: out / "base"} | {seed: out / f"router-{seed}" for seed in seeds}
    lens = MoELens.from_pretrained(model)
    train, dev = (load_examples("swap", split=part, limit=limit) for part in ("train", "dev"))
    answered = [example for task in ANSWERED for example in load_examples(task, split=split, limit=limit)]
    facts: dict[str, object] = {
        "weights": weights_digest(lens.module),
        "split": split,
        "rates": list(RATES),
        "schedule": repr(SCHEDULE),
    }
    facts |= {"tuned_on": data_digest(train), "dev": data_digest(dev), "template": lens.template.facts()}
    made_by = provenance(model=model, data=answered, facts=facts | {"seeds": ",".join(map(str, seeds))})
    claim(out, made_by)
    tables = []
    for seed in (None, *seeds):
        file = folders[seed] / "measured.parquet"

        def measured(seed: int | None = seed, folder: Path = file.parent) -> pd.DataFrame:
            lens = MoELens.from_pretrained(model)
            if seed is not None:
                tune_and_save(lens, train, dev, seed=seed, folder=folder, model=model)
            return task_table(lens, seed=seed, split=split, limit=limit)

        tables.append(kept(file, provenance(model=model, data=answered, seed=seed, facts=facts), measured))
    rates = [read_table(folders[seed] / "dev.parquet") for seed in seeds]
    table = pd.concat(tables)
    write_table(table, out / "tasks.parquet", made_by)
    write_table(pd.concat(rates), out / "learning_rates.parquet", made_by)
    console.show(pd.concat(rates), title="Dev exact match on swap, by learning rate")
    console.show(table, title=f"{model}: every task, {split} split")
    console.say(f"written to {out}: tasks.parquet, learning_rates.parquet, base/, router-SEED/")
