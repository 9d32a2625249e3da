"""Choosing a strength on held-out examples, before a masking command answers those that it is judged on."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from moe_lens.choosing.controls import Controls
from moe_lens.choosing.doses import KEPT, Candidate, dose_table
from moe_lens.choosing.selection import Choice
from moe_lens.commands import console
from moe_lens.commands.masking_tasks import TaskRun, Tasks
from moe_lens.commands.options import Reading
from moe_lens.commands.saved_interventions import Saved
from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.lens.interventions import Mode
from moe_lens.lens.lens import MoELens
from moe_lens.lens.parallel import is_first
from moe_lens.report.plots import dose_choice_figure
from moe_lens.results import data_digest, write_table

FEWEST = 96
"""How many examples of each task a strength is chosen on at least."""
SHOWN = ("set", "strength", "task", "role", "n", "unmasked", "em", "em_low", "em_high", "kept", "keeps", "chosen")


def expect_doses(mode: Mode, experts: Sequence[str], saved: Mapping[str, Saved]) -> None:
    """MoELensError unless there is something to choose from."""
    if (experts and not mode.is_dosed) or not (mode.is_dosed or saved):
        raise MoELensError(
            "--choose-dose chooses among strengths: give a --mode with several, such as bias:1,2,5, or a saved one, "
            f"--intervention FOLDER:0.5,1,2; --mode is {mode}"
        )


def dev_examples(
    reading: Reading,
    lens: MoELens,
    tested: Mapping[str, Sequence[Example]],
    *,
    split: str,
    limit: int | None,
) -> dict[str, Sequence[Example]]:
    """Of each task the examples to choose on; tested: those that are answered afterwards.

    MoELensError, naming the task, for fewer than `FEWEST`, and for any that is among those tested.
    """
    found: dict[str, Sequence[Example]] = {}
    for task, asked in tested.items():
        own = reading.fit(reading.load(task, split=split, limit=limit), lens, of=f"{task}, {split}").examples
        if len(own) < FEWEST:
            raise MoELensError(
                f"{task}, {split}: a strength is chosen on {FEWEST} examples or more of each task; there are "
                f"{len(own)}: give a task with more, or another --dev-split"
            )
        if again := set(own) & set(asked):
            raise MoELensError(
                f"{task}: {len(again)} examples of {split} are also among those that are answered afterwards, and a "
                "strength chosen on them would look better than it is; give data with splits, or another --dev-split"
            )
        found[task] = own
    return found


def facts(dev: Mapping[str, Sequence[Example]]) -> dict[str, Any]:
    """For the provenance; nothing where nothing is chosen."""
    if not dev:
        return {}
    return {"dose_chosen_on": {task: data_digest(own) for task, own in dev.items()}, "to_be_kept": KEPT}


def choose_doses(
    run: TaskRun, saved: Mapping[str, Saved], lens: MoELens, dev: Mapping[str, Sequence[Example]], tasks: Tasks
) -> list[TaskRun]:
    """The runs of what is chosen, each at its strength, and of the model as it is; what was found on `dev` is left."""
    found = replace(run, metrics=(), controls=Controls(0)).on_all(lens, None, dev, ())
    among = _candidates(run.mode, run.chosen, saved, lens.architecture.top_k)
    table = dose_table(found.answers, among, targets=tasks.targets, spared=tasks.spared, seed=run.seed)
    if is_first():
        write_table(found.answers, run.out / "dev_answers.parquet", run.made_by)
        write_table(table, run.out / "dose_choice.parquet", run.made_by)
        console.save_figure(dose_choice_figure(table), run.out / "dose_choice.html")
    console.show(table, SHOWN, title="On the held-out examples, by strength")
    console.say(*_told(table))
    names = set(table.loc[table["chosen"], "intervention"])
    runs = []
    for dose in run.mode.doses if run.mode.is_dosed else ():
        chosen = [choice for choice in run.chosen if run.mode.label(choice.name, dose) in names]
        runs += [replace(run, chosen=chosen, mode=replace(run.mode, doses=(dose,)), saved={})] if chosen else []
    kept = {name: one for name, one in run.saved.items() if name in names}
    return [*runs, replace(run, chosen=(), mode=Mode("zero"), saved=kept)] if kept or not runs else runs


def _candidates(mode: Mode, chosen: Sequence[Choice], saved: Mapping[str, Saved], top_k: int) -> list[Candidate]:
    """Every set at every strength, and the saved ones at theirs."""
    doses = [dose for dose in mode.doses if dose is not None]
    return [
        Candidate(mode.label(choice.name, dose), choice.name, dose, abs(dose - mode.neutral(top_k)))
        for choice in chosen
        for dose in doses
    ] + [
        Candidate(name, one.of, strength, abs(strength))
        for name, one in saved.items()
        for strength in (1.0 if one.strength is None else one.strength,)
    ]


def _told(table: pd.DataFrame) -> list[str]:
    """What was chosen of each set, in words."""
    lines = []
    for name, part in table.groupby("set", sort=False):
        own = part[part["chosen"]]
        if own.empty:
            lines.append(
                f"{name}: no strength keeps {KEPT} of every spared task and raises the target, so none is answered "
                "with; the model as it is stands alone"
            )
        else:
            scores = ", ".join(f"{row.task} {row.em:.3f} (without {row.unmasked:.3f})" for row in own.itertuples())
            lines.append(f"{name}: {own['intervention'].iloc[0]} is chosen: {scores}")
    return lines
