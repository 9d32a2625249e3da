"""Causal masking runs from the command line: `python -m moe_lens.intervene --help`."""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated

import pandas as pd
from typer import Option

from moe_lens.choosing.masking import answer_all, check_choices, masking_rows, random_controls, show_rows, write_run
from moe_lens.choosing.scores import Score, measure_usage, score_table
from moe_lens.choosing.selection import Choice, check_specification, choose, score_of, scores_needed
from moe_lens.commands import console, options
from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.lens.delta import weights_digest
from moe_lens.lens.interventions import MODES
from moe_lens.lens.lens import MoELens
from moe_lens.organism import planted_experts
from moe_lens.results import portable, provenance, read_if_made_by, refuse_another_run, write_table


def main(
    model: Annotated[str, Option(help="'organism', 'organism:planted', a folder, or a hub id.")],
    data: options.Data,
    experts: Annotated[
        list[str],
        Option(
            help="What to mask; may be given several times: ce:4 or ce:1,2,4 (the highest "
            "per layer by a score), planted, FILE.json, or literally '3:5,7;4:0'."
        ),
    ],
    out: Annotated[
        Path,
        Option(
            help="Folder for answers.parquet, summary.json and the figure. The same command with "
            "the same folder goes on where an interrupted one stopped."
        ),
    ],
    delta: Annotated[
        Path | None, Option(help="Folder of a delta that moe_lens.tune wrote (the router-tuned model).")
    ] = None,
    base: Annotated[
        str | None, Option(help="The model before tuning, for oe and gains; default --model without its delta.")
    ] = None,
    compare: Annotated[list[str] | None, Option(help="More sets to mask, to compare with; as --experts.")] = None,
    control: Annotated[
        str, Option(help="random:N masks N random sets of the same sizes; none masks none.")
    ] = "random:20",
    mode: Annotated[
        str,
        Option(
            help="zero: gating weight 0 (the paper's text). renormalize: and the others rescaled. "
            "reroute: removed before top-k (the paper's released code)."
        ),
    ] = "zero",
    split: Annotated[str, Option(help="Which split of a task or data set is answered.")] = "test",
    score_split: Annotated[
        str, Option(help="Which split of --data the scores are counted on (a file has no splits: all of it).")
    ] = "train",
    score_limit: Annotated[int | None, Option(min=1, help="Count scores on the first so many examples only.")] = None,
    layers: Annotated[str | None, Option(help="Mask in these layers only, such as 0,2,3; default all.")] = None,
    columns: options.Columns = None,
    skip_bad: options.SkipBad = False,
    max_length: options.MaxLength = None,
    too_long: options.HowTooLong = "drop",
    limit: Annotated[int | None, Option(min=1, help="Answer the first so many examples only.")] = None,
    batch_size: Annotated[int, Option(min=1, help="Examples per batch.")] = 32,
    max_new_tokens: Annotated[int, Option(min=1, help="Longest answer, in tokens.")] = 16,
    dtype: Annotated[str | None, Option(help="float32, bfloat16 or float16; default the checkpoint's own.")] = None,
    device: Annotated[str | None, Option(help="As transformers' device_map: cpu, cuda, auto, …")] = None,
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Run the Python code that some models bring beside their weights.")
    ] = False,
    seed: Annotated[int, Option(min=0, help="Of the random sets, the bootstrap and the permutation test.")] = 0,
) -> None:
    """Mask experts and see what the model still answers.

    For example, the paper's Figure 3 on the packaged model: its context-faithful experts (ce, the highest
    context-dependence ratio of the router-tuned model) against its original experts (oe) and 20 random sets:

    \b
        python -m moe_lens.tune --method router --model organism --data swap \\
            --learning-rate 5e-3,2e-2 --out RUN/router
        python -m moe_lens.intervene --model organism --delta RUN/router --data swap \\
            --experts ce:1,2,4 --compare oe:1,2,4 --control random:20 --mode zero --out RUN/masking
    """
    if mode not in MODES:
        raise MoELensError(f"--mode must be one of {', '.join(MODES)}; got {mode!r}")
    reading = options.Reading(columns, skip_bad, max_length, too_long)
    loaded = reading.load(data, split=split, limit=limit)
    specifications = [*experts, *(compare or [])]
    n_controls = _control_count(control)
    within = None if layers is None else console.numbers(layers, int, what="--layers")
    for specification in specifications:
        check_specification(specification)
    needed = scores_needed(specifications)
    to_score = reading.load(data, split=score_split, limit=score_limit) if needed else []
    facts = {"dtype": dtype, "mode": mode, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    compared = any(s.of == "gain" for s in needed) or len({s.of for s in needed}) > 1
    if compared and delta is None and base is None:
        raise MoELensError(
            "these scores compare a tuned model with its base; give --delta, or --base for a tuned --model"
        )
    if any(score.needs_tuned for score in needed) and delta is None and base is None:
        print(f"note: {model} is taken to be router-tuned; give --delta if it is not", file=sys.stderr)
    load = partial(
        MoELens.from_pretrained,
        dtype=console.dtype_named(dtype),
        device_map=device,
        trust_remote_code=trust_remote_code,
    )
    lens = load(model, delta=delta)
    for layer in within or ():
        lens.architecture.at(layer)
    for specification in specifications:
        check_specification(specification, n_experts=lens.architecture.n_experts)
    unscored = [text for text in specifications if score_of(text) is None]
    check_choices(_choose_all(unscored, {}, model, within), mode, lens.architecture)  # before scores are counted
    fitted = reading.fit(loaded, lens.tokenizer, of=f"{data}, {split}")
    weights = weights_digest(lens.module)
    facts |= reading.facts(fitted) | {"weights": weights}
    made_by = provenance(model=model, delta=delta, data=fitted.examples, seed=seed, facts=facts)
    refuse_another_run(out / "answers.parquet", made_by)
    scored = reading.fit(to_score, lens.tokenizer, of=f"{data}, {score_split}").examples if needed else ()
    score_facts = {"base": base and portable(base), "dtype": dtype, "weights": weights}
    scored_by = provenance(model=model, delta=delta, data=scored, facts=score_facts)
    tables = _score_tables(lens, lambda: load(base or model), needed, scored, out, scored_by)
    choices = _choose_all(specifications, tables, model, within)
    choices += random_controls(choices, n_controls, n_experts=lens.architecture.n_experts, seed=seed)
    answers = answer_all(
        lens, fitted.examples, choices, mode, out, made_by, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    rows = masking_rows(answers, choices, mode, seed=seed)
    files = write_run(answers, rows, out, made_by)
    show_rows(rows, title=f"Answers with experts masked ({mode})")
    print(f"written to {out}: {', '.join(files)}")


def _score_tables(
    lens: MoELens,
    load_base: Callable[[], MoELens],
    scores: list[Score],
    examples: Sequence[Example],
    out: Path,
    made_by: dict,
) -> dict[str, pd.DataFrame]:
    """Every score's table, from its file in `out` where that was made the same way; else counted, and kept there."""
    files = {score: out / f"score-{score.name}.parquet" for score in scores}
    tables = {score.name: read_if_made_by(file, made_by) for score, file in files.items()}
    missing = [score for score in scores if tables[score.name] is None]
    from_base = [score for score in missing if score.needs_base]
    base = measure_usage(load_base(), examples, from_base) if from_base else {}
    tuned = measure_usage(lens, examples, [score for score in missing if score.needs_tuned])
    for score in missing:
        tables[score.name] = score_table(score, base=base, tuned=tuned).assign(name=score.name)
        write_table(tables[score.name], files[score], made_by)
    return tables


def _choose_all(
    specifications: Sequence[str], tables: Mapping[str, pd.DataFrame], model: str, layers: Sequence[int] | None
) -> list[Choice]:
    """The sets that the specifications name, each once."""
    planted = partial(planted_experts, model)
    found = [choose(text, tables=tables, planted=planted, layers=layers) for text in specifications]
    return list(dict.fromkeys(chain.from_iterable(found)))


def _control_count(control: str) -> int:
    if control == "none":
        return 0
    name, _, count = control.partition(":")
    if name != "random" or not count.isdigit() or int(count) < 1:
        raise MoELensError(f"--control must be random:N with N of at least 1, or none; got {control!r}")
    return int(count)


if __name__ == "__main__":
    console.run(main)
