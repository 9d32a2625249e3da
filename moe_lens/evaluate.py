"""Evaluation from the command line: `python -m moe_lens.evaluate --help`."""

from pathlib import Path
from typing import Annotated

from typer import Option

from moe_lens.choosing.scores import IN_SHORT
from moe_lens.commands import console, options
from moe_lens.errors import MoELensError
from moe_lens.metrics.catalogue import DEFAULT_METRICS, METRICS


def main(
    opening: options.Opening,
    data: options.Data,
    out: Annotated[
        Path,
        Option(
            help="Folder for answers.parquet and summary.parquet. The same command with the same folder goes on "
            "where an interrupted one stopped."
        ),
    ],
    metrics: Annotated[
        str,
        Option(
            help=f"With commas, of {', '.join(METRICS)}, or package.module:function, a function of a prediction and "
            "its Example that gives a number."
        ),
    ] = ",".join(DEFAULT_METRICS),
    mask: Annotated[
        list[str] | None,
        Option(
            help="Answer with these experts masked too (several times): ce:4, esft-gate:p=0.2, set:4, random:8, "
            f"planted, FILE.json, or '3:5,7;4:0'. Scores: {IN_SHORT}."
        ),
    ] = None,
    doing: options.Doing = options.Doing(),
    control: options.Control = "none",
    scoring: options.Scoring = options.Scoring(),
    judge: Annotated[
        str | None, Option(help="For acc_llm: base URL of a server that speaks the OpenAI chat protocol, with its /v1.")
    ] = None,
    judge_model: Annotated[str | None, Option(help="The judge's name on that server.")] = None,
    split: Annotated[str, Option(help="Which split of a task or data set is answered.")] = "test",
    limit: Annotated[int | None, Option(min=1, help="Answer the first so many examples only.")] = None,
    reading: options.Reading = options.Reading(),
    batch_size: Annotated[int, Option(min=1, help="Examples per batch; halved where memory is too small.")] = 32,
    max_new_tokens: Annotated[int, Option(min=1, help="Longest answer, in tokens.")] = 16,
    stop: options.Stop = None,
    decoding: options.Decoding = "plain",
    preset: options.EvaluatePreset = None,
    citations: Annotated[
        bool,
        Option(
            "--citations",
            help="Write citations.parquet too: what each sentence of its context adds to the model's own answer, by 64 "
            "random ablations (ContextCite). `python -m moe_lens.report OUT` shows it.",
        ),
    ] = False,
    seed: Annotated[int, Option(min=0, help="Of random experts, the bootstrap and the permutation tests.")] = 0,
) -> None:
    """Score a model's answers, as it is and with experts masked.

    For example, on the packaged model:

    \b
        python -m moe_lens.evaluate --model organism --data swap --metrics em,f1,memory --out RUN/evaluation

    Several processes share the work: torchrun --nproc-per-node 2 -m moe_lens.evaluate …
    """
    from moe_lens.causal.evaluation import check_metrics, evaluate
    from moe_lens.causal.judge import judge_of
    from moe_lens.choosing.controls import Controls, compared_summary
    from moe_lens.choosing.masking import named, with_saved
    from moe_lens.commands.named_experts import NamedExperts
    from moe_lens.commands.presets import preset_facts
    from moe_lens.commands.prompt_lists import Asked
    from moe_lens.decoding import context_citations, parse_decoding
    from moe_lens.lens.parallel import agreed_on, connected, from_first_process, sharing
    from moe_lens.metrics.catalogue import metrics_named
    from moe_lens.results import claim, provenance, write_table
    from moe_lens.storage import try_folder

    try_folder(out)
    controls = Controls.parse(control)
    if controls.count and not mask:
        raise MoELensError("--control compares masks with random sets of their shape; give --mask, or leave it out")
    mode, saved = doing.parsed(), doing.saved()
    ends, answering = options.ends(stop), parse_decoding(decoding)
    scored = metrics_named(metrics.split(","))
    names = [metric.name for metric in scored]
    asked = judge_of(judge, judge_model, cache=out / "judge")
    processes = connected()
    opening = opening.of_process(processes)
    own = Asked(reading, max_new_tokens, ends)
    wanted = NamedExperts(mask or [], opening, scoring, own, data, mode=mode, layers=doing.within, seed=seed)
    loaded = reading.load(data, split=split, limit=limit)
    lens = opening.load()
    lens.batch_size, lens.progress = batch_size, processes.is_main_process
    wanted.check(lens)
    fitted = reading.fit(loaded, lens, of=data)
    facts = mode.facts() | {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "stop": ends}
    facts |= options.told_decoding(answering, fitted.examples)
    facts |= opening.facts(lens) | reading.facts(fitted)
    made_by = provenance(model=opening.model, delta=opening.delta, data=fitted.examples, facts=facts)
    check_metrics(scored, fitted.examples, asked)
    made_by |= preset_facts(preset, "evaluate")
    told = made_by | {"seed": seed, "metrics": names, "judge": judge_model}
    told |= {"saved": {name: one.intervention.digest for name, one in saved.items()}} if saved else {}
    from_first_process(lambda: claim(out, told | {"experts": wanted.told(), "control": controls.told}))
    with sharing():
        chosen = wanted.choose(lens, out)
        compared = agreed_on(controls.measured(lens, fitted.examples, mode))
    drawn = compared.drawn(chosen, n_experts=lens.architecture.n_experts, seed=seed)
    found = evaluate(
        lens,
        fitted.examples,
        with_saved(named([*chosen, *drawn], mode), {name: one.intervention for name, one in saved.items()}),
        metrics=scored,
        max_new_tokens=max_new_tokens,
        stop=ends,
        decoding=answering,
        judge=asked,
        out=out,
        made_by=made_by,
        seed=seed,
    )
    cited = None
    if citations and (opening.parallel or processes.is_main_process):
        cited = context_citations(lens, fitted.examples, max_new_tokens=max_new_tokens, stop=ends)
    if not processes.is_main_process:
        return
    if cited is not None:
        write_table(cited.table, out / "citations.parquet", told)
        console.say(f"{out / 'citations.parquet'}: {cited}")
    write_table(found.answers, out / "answers.parquet", told)
    summary = found.summary
    if drawn:
        summary = compared_summary(found.answers, chosen, drawn, scored, mode=mode, usage=compared.usage, seed=seed)
    write_table(summary, out / "summary.parquet", told)
    console.show(summary, title=f"{len(fitted.examples)} examples of {data}")
    if chosen and not drawn:
        console.note("a drop alone may be any mask's: --control random:20 compares it with that of random sets")
    console.say(f"written to {out}: answers.parquet, summary.parquet")


if __name__ == "__main__":
    console.run(main, shares=True)
