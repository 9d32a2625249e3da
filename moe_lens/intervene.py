"""Causal masking runs from the command line: `python -m moe_lens.intervene --help`."""

from pathlib import Path
from typing import Annotated

from typer import Option

from moe_lens.choosing.scores import SCORES
from moe_lens.commands import console, options


def main(
    opening: options.Opening,
    data: options.Data,
    experts: Annotated[
        list[str],
        Option(
            help="What to mask; may be given several times: ce:4 or ce:1,2,4 (the highest of each layer by a score), "
            "esft-gate:p=0.2 (the highest until their scores sum to 0.2), random:8, planted, FILE.json, or literally "
            f"'3:5,7;4:0'. Scores: {', '.join(SCORES)}."
        ),
    ],
    out: Annotated[
        Path,
        Option(
            help="Folder for answers.parquet, summary.json and the figure. The same command with "
            "the same folder goes on where an interrupted one stopped."
        ),
    ],
    scoring: options.Scoring = options.Scoring(),
    compare: Annotated[list[str] | None, Option(help="More sets to mask, to compare with; as --experts.")] = None,
    control: options.Control = "random:20",
    mode: Annotated[
        str,
        Option(
            help="zero: gating weight 0 (the paper's text). renormalize: and the others rescaled. "
            "reroute: removed before top-k (the paper's released code)."
        ),
    ] = "zero",
    split: Annotated[str, Option(help="Which split of a task or data set is answered.")] = "test",
    layers: Annotated[str | None, Option(help="Mask in these layers only, such as 0,2,3; default all.")] = None,
    reading: options.Reading = options.Reading(),
    limit: Annotated[int | None, Option(min=1, help="Answer the first so many examples only.")] = None,
    batch_size: Annotated[int, Option(min=1, help="Examples per batch.")] = 32,
    max_new_tokens: Annotated[int, Option(min=1, help="Longest answer, in tokens.")] = 16,
    stop: options.Stop = None,
    seed: Annotated[
        int, Option(min=0, help="Of random experts, the random sets, the bootstrap and the permutation test.")
    ] = 0,
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
    from moe_lens.choosing.masking import mask
    from moe_lens.commands.masking_results import leave_masked
    from moe_lens.commands.named_experts import NamedExperts
    from moe_lens.results import claim, provenance
    from moe_lens.storage import try_folder

    try_folder(out)
    controls = options.control_count(control)
    ends = options.ends(stop)
    within = None if layers is None else console.numbers(layers, int, what="--layers")
    loaded = reading.load(data, split=split, limit=limit)
    texts = [*experts, *(compare or [])]
    wanted = NamedExperts(texts, opening, scoring, reading, data, mode=mode, layers=within, seed=seed)
    lens = opening.load()
    lens.batch_size = batch_size
    wanted.check(lens)
    fitted = reading.fit(loaded, lens, of=f"{data}, {split}")
    facts = {"mode": mode, "max_new_tokens": max_new_tokens, "batch_size": batch_size, "stop": ends}
    facts |= opening.facts(lens) | reading.facts(fitted)
    made_by = provenance(model=opening.model, delta=opening.delta, data=fitted.examples, seed=seed, facts=facts)
    claim(out, made_by | {"experts": wanted.told(), "control": controls})
    found = mask(
        lens,
        fitted.examples,
        wanted.choose(lens, out),
        mode,
        controls=controls,
        max_new_tokens=max_new_tokens,
        stop=ends,
        out=out,
        made_by=made_by,
        seed=seed,
    )
    leave_masked(found, out, made_by, title=f"Answers with experts masked ({mode})")


if __name__ == "__main__":
    console.run(main)
