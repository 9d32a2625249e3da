"""What the demonstration does: tunes the packaged model's routers, ranks its experts, masks them, and writes a page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from moe_lens.causal.evaluation import answer_table, summarise
from moe_lens.choosing.masking import mask
from moe_lens.choosing.measuring import Models, score_tables
from moe_lens.choosing.planted import has_planted, planted_experts
from moe_lens.choosing.scores import SCORES
from moe_lens.choosing.selection import Ground, Planted, Selection, Top, choices
from moe_lens.commands import console
from moe_lens.commands.masking_results import leave_masked
from moe_lens.data import load_examples
from moe_lens.experts import ExpertSet
from moe_lens.lens.delta import fingerprint, weights_digest
from moe_lens.lens.lens import MoELens
from moe_lens.report.page import build_report
from moe_lens.results import claim, provenance, write_table
from moe_lens.storage import try_folder
from moe_lens.tuning import Schedule, TuneRouters, router_parameters, tune

SCORE_NAMES = ("ce", "oe", "ce-gain", "ce-last")
TASKS = ("swap", "novel", "closed_book")
SIZE, MAX_NEW_TOKENS, SCORED = 4, 8, 400


def demonstrate(out: Path, model: str, *, learning_rate: float, epochs: int, limit: int, n_random: int) -> None:
    """Tune, rank, mask and report, saying what is done and what came of it; tables and figures go to `out`."""
    try_folder(out)
    schedule = Schedule(learning_rate=learning_rate, epochs=epochs, batch_size=16)
    swap = load_examples("swap", limit=limit)
    facts = {"learning_rate": learning_rate, "epochs": epochs, "limit": limit, "max_new_tokens": MAX_NEW_TOKENS}
    console.say(f"1. {model} as it is")
    lens = MoELens.from_pretrained(model)
    made_by = provenance(model=model, data=swap, facts=facts | {"template": lens.template.facts()})
    claim(out, made_by | {"weights": weights_digest(lens.module), "n_random": n_random})
    tasks = _answers(lens, "base", limit)

    names = router_parameters(lens)
    sizes = {name: parameter.numel() for name, parameter in lens.module.named_parameters()}
    share = sum(sizes[name] for name in names) / sum(sizes.values())
    console.say(f"2. Router tuning: {share:.1%} of the parameters learn to answer from the context")
    train, dev = load_examples("swap", split="train"), load_examples("swap", split="dev", limit=100)
    tuned = tune(lens, train, dev, TuneRouters(), schedule, out=out, max_new_tokens=MAX_NEW_TOKENS)
    made_by["routers"] = fingerprint(lens.module, names)
    write_table(tuned.log, out / "tuning.parquet", made_by)
    tasks += _answers(lens, "router-tuned", limit)
    write_table(pd.DataFrame(tasks), out / "tasks.parquet", made_by)
    console.show(
        pd.DataFrame(tasks),
        ("variant", "task", "n", "em", "em_low", "em_high", "memory"),
        title="Exact match (memory: answered what it remembers instead of what the context says)",
    )

    console.say("3. Which experts, and do they cause it?")
    models = Models.opened(lambda: MoELens.from_pretrained(model), lens)
    scores = [SCORES[name] for name in SCORE_NAMES]
    tables = score_tables(scores, models, train[:: max(1, len(train) // SCORED)])
    planted = planted_experts(model) if has_planted(model) else ExpertSet()
    write_table(_usage_maps(tables, planted), out / "usage.parquet", made_by)
    wanted: list[Selection] = [Top(score, SIZE) for score in scores]
    chosen = choices([*wanted, *([Planted()] if planted else [])], Ground(lens.architecture, model, tables))
    found = mask(
        lens, swap, chosen, controls=n_random, max_new_tokens=MAX_NEW_TOKENS, batch_size=64, out=out, made_by=made_by
    )
    leave_masked(
        found,
        out,
        made_by,
        title=f"swap, with {SIZE} experts per layer masked (ce: the paper's context-faithful experts)",
    )
    page = build_report(out, title=f"moe_lens on {model}")
    console.say(f"The figures and tables are in {page}")


def _usage_maps(tables: Mapping[str, pd.DataFrame], planted: ExpertSet) -> pd.DataFrame:
    """The base router's ratios, the tuned router's, and the gain, one below the other; the planted experts marked."""
    panels = {"oe": "base router", "ce": "tuned router (context-dependence ratio)", "ce-gain": "gain"}
    maps = pd.concat([tables[name].assign(panel=panel) for name, panel in panels.items()], ignore_index=True)
    return maps.assign(planted=[pair in planted for pair in zip(maps["layer"], maps["expert"], strict=True)])


def _answers(lens: MoELens, variant: str, limit: int) -> list[dict[str, Any]]:
    """A row per task for the model as it is now."""
    rows = []
    for task in TASKS:
        answers = answer_table(lens, load_examples(task, limit=limit), max_new_tokens=MAX_NEW_TOKENS, batch_size=64)
        rows.append({"variant": variant, "task": task, **summarise(answers)})
    return rows
