"""The whole method on the packaged model in minutes: `python -m moe_lens.demo`, or `make demo`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import pandas as pd
from typer import Option

from moe_lens.causal.evaluation import answer_table, summarise
from moe_lens.choosing.masking import answer_all, masking_rows, random_controls, show_rows, write_run
from moe_lens.choosing.scores import SCORES, measure_usage, score_table
from moe_lens.choosing.selection import Choice
from moe_lens.commands import console
from moe_lens.data import load_examples
from moe_lens.experts import ExpertSet
from moe_lens.lens.delta import fingerprint
from moe_lens.lens.lens import MoELens
from moe_lens.organism import has_planted, planted_experts
from moe_lens.report.page import build_report
from moe_lens.results import provenance, write_table
from moe_lens.tuning import Schedule, router_parameters, tune_router

SCORE_NAMES = ("ce", "oe", "ce-gain", "ce-last")
TASKS = ("swap", "novel", "closed_book")
SIZE, MAX_NEW_TOKENS = 4, 8


def main(
    out: Annotated[Path, Option(help="Folder for the tables, figures and report.html.")] = Path("demo"),
    model: Annotated[
        str, Option(help="organism:planted (the experts that read are known) or organism.")
    ] = "organism:planted",
    learning_rate: Annotated[float, Option(help="Of the router tuning.")] = 2e-2,
    epochs: Annotated[int, Option(help="Passes over the training questions.")] = 2,
    limit: Annotated[int, Option(help="Test questions per task.")] = 200,
    n_random: Annotated[int, Option(help="Random sets of experts to compare with.")] = 8,
) -> None:
    """Tune the routers of a model that ignores its context, find the experts that now read it, and mask them.

    The model is a small MoE that knows facts of a made-up world by heart and, asked about them, disregards a context
    that says otherwise. Everything runs on a CPU, without a download.
    """
    schedule = Schedule(learning_rate=learning_rate, epochs=epochs, batch_size=16)
    train, swap = load_examples("swap", split="train"), load_examples("swap", limit=limit)
    facts = {"learning_rate": learning_rate, "epochs": epochs, "limit": limit, "max_new_tokens": MAX_NEW_TOKENS}
    made_by = provenance(model=model, data=swap, facts=facts)
    scores = [SCORES[name] for name in SCORE_NAMES]

    print(f"1. {model} as it is: answers, and which experts its router selects")
    lens = MoELens.from_pretrained(model)
    tasks = _answers(lens, "base", limit)
    base = measure_usage(lens, train[:: max(1, len(train) // 400)], scores)

    names = router_parameters(lens)
    sizes = {name: parameter.numel() for name, parameter in lens.module.named_parameters()}
    share = sum(sizes[name] for name in names) / sum(sizes.values())
    print(f"2. Router tuning: {share:.1%} of the parameters learn to answer from the context")
    dev = load_examples("swap", split="dev", limit=100)
    tuned = tune_router(lens, train, dev, schedule, max_new_tokens=MAX_NEW_TOKENS)
    made_by["routers"] = fingerprint(lens.module, names)
    write_table(tuned.log, out / "tuning.parquet", made_by)
    tasks += _answers(lens, "router-tuned", limit)
    write_table(pd.DataFrame(tasks), out / "tasks.parquet", made_by)
    usage = measure_usage(lens, train[:: max(1, len(train) // 400)], scores)
    console.show(
        pd.DataFrame(tasks),
        ("variant", "task", "n", "em", "em_low", "em_high", "memory"),
        title="Exact match (memory: answered what it remembers instead of what the context says)",
    )

    print("3. Which experts, and do they cause it?")
    tables = {score.name: score_table(score, base=base, tuned=usage) for score in scores}
    choices = [Choice(f"{name}:{SIZE}", name, ExpertSet.top(table, SIZE)) for name, table in tables.items()]
    planted = planted_experts(model) if has_planted(model) else None
    if planted is not None:
        choices.append(Choice("planted", "planted", planted))
    write_table(_usage_maps(tables, planted or ExpertSet()), out / "usage.parquet", made_by)
    choices += random_controls(choices, n_random, n_experts=lens.architecture.n_experts, seed=0)
    answers = answer_all(lens, swap, choices, "zero", out, made_by, max_new_tokens=MAX_NEW_TOKENS, batch_size=64)
    rows = masking_rows(answers, choices, "zero")
    write_run(answers, rows, out, made_by)
    show_rows(rows, title=f"swap, with {SIZE} experts per layer masked (ce: the paper's context-faithful experts)")
    page = build_report(out, title=f"moe_lens on {model}")
    print(f"The figures and tables are in {page}")


def _usage_maps(tables: Mapping[str, pd.DataFrame], planted: ExpertSet) -> pd.DataFrame:
    """The base router's ratios, the tuned router's, and the gain, one below the other; the planted experts marked."""
    panels = {"oe": "base router", "ce": "tuned router (context-dependence ratio)", "ce-gain": "gain"}
    maps = pd.concat([tables[name].assign(panel=panel) for name, panel in panels.items()], ignore_index=True)
    return maps.assign(planted=[pair in planted for pair in zip(maps["layer"], maps["expert"], strict=True)])


def _answers(lens: MoELens, variant: str, limit: int) -> list[dict]:
    """A row per task for the model as it is now."""
    return [
        {
            "variant": variant,
            "task": task,
            **summarise(
                answer_table(lens, load_examples(task, limit=limit), max_new_tokens=MAX_NEW_TOKENS, batch_size=64)
            ),
        }
        for task in TASKS
    ]


if __name__ == "__main__":
    console.run(main)
