"""Causal masking runs from the command line: `python -m moe_lens.intervene --help`."""

from itertools import chain
from pathlib import Path
from typing import Annotated

from typer import Option

from moe_lens.choosing.scores import IN_SHORT
from moe_lens.commands import console, options
from moe_lens.commands.patch_maps import MapRun, Patching
from moe_lens.errors import MoELensError


def main(
    opening: options.Opening,
    data: options.Data,
    out: Annotated[
        Path,
        Option(
            help="Folder for answers.parquet, masking.parquet or doses.parquet, summary.json and the figures, of a map "
            "patching.parquet. The same command with the same folder goes on where an interrupted one stopped."
        ),
    ],
    experts: Annotated[
        list[str] | None,
        Option(
            help="What to mask; may be given several times: ce:4 or ce:1,2,4 (the highest of each layer by a score), "
            "esft-gate:p=0.2 (the highest until their scores sum to 0.2), set:4 (learned as a whole), random:8, "
            f"planted, FILE.json, or literally '3:5,7;4:0'. Scores: {IN_SHORT}."
        ),
    ] = None,
    spare: Annotated[
        str | None,
        Option(
            help="Tasks that are to be spared, with commas, such as closed_book,consistent: adds the matrix of what "
            "each intervention costs on every task, with a verdict of selectivity. --data, those that are to be hit, "
            "may name several too; scores of experts are measured on its first."
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        Option(
            help="File of a plan: the first run writes its sets, tasks, metrics, thresholds and seeds there, and later "
            "ones are held to it, so that a run on other data or another training is confirmatory."
        ),
    ] = None,
    patching: Patching = Patching(),
    choose_dose: Annotated[
        bool,
        Option(
            "--choose-dose",
            help="First choose a strength of --mode or --intervention: on --dev-split, of each set the one with the "
            "highest EM on --data of those that leave every --spare task .95 of its EM. Only what is chosen, its "
            "random sets and the model as it is are then answered on --split.",
        ),
    ] = False,
    dev_split: Annotated[
        str, Option(help="--choose-dose: the split to choose on, with 96 examples of each task or more.")
    ] = "dev",
    dev_limit: Annotated[
        int | None, Option(min=1, help="--choose-dose: choose on the first so many of each task only.")
    ] = None,
    scoring: options.Scoring = options.Scoring(),
    compare: Annotated[list[str] | None, Option(help="More sets to mask, to compare with; as --experts.")] = None,
    control: options.Control = "random:20",
    doing: options.Doing = options.Doing(),
    metrics: Annotated[
        str | None,
        Option(
            help="More scores than EM, F1 and memory, as --metrics of moe_lens.evaluate, also package.module:function; "
            "they stand in summary.parquet, and have verdicts of their own beside EM's. Curves go by EM. With --patch "
            "the one that the map shows; default logit_difference where memory is known, else answer_log_probability."
        ),
    ] = None,
    split: Annotated[str, Option(help="Which split of a task or data set is answered.")] = "test",
    reading: options.Reading = options.Reading(),
    limit: Annotated[int | None, Option(min=1, help="Answer the first so many examples only.")] = None,
    batch_size: Annotated[int, Option(min=1, help="Examples per batch.")] = 32,
    max_new_tokens: Annotated[int, Option(min=1, help="Longest answer, in tokens.")] = 16,
    stop: options.Stop = None,
    decoding: options.Decoding = "plain",
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

    Or at several strengths, on a task that shall be hit and one to spare:

    \b
        python -m moe_lens.intervene --model organism:planted --data swap --spare closed_book \\
            --experts planted --mode bias:1,3,5 --positions from_question --out RUN/doses

    With --choose-dose the strength is chosen on the dev split, and the test split is answered at that one alone.

    Or a map of where it comes in what the context says, by activation patching:

    \b
        python -m moe_lens.intervene --model organism:planted --data swap \\
            --patch memory --over experts --out RUN/patching
    """
    from moe_lens.causal.evaluation import check_metrics
    from moe_lens.choosing.controls import Controls
    from moe_lens.choosing.doses import merged
    from moe_lens.choosing.verdicts import check_judged
    from moe_lens.commands import dose_choosing
    from moe_lens.commands.masking_results import leave_masked, leave_selectivity
    from moe_lens.commands.masking_tasks import TaskRun, Tasks
    from moe_lens.commands.named_experts import NamedExperts
    from moe_lens.commands.plans import hold_to_plan, planned
    from moe_lens.commands.prompt_lists import Asked, asking
    from moe_lens.decoding import parse_decoding
    from moe_lens.lens.parallel import agreed_on, connected, from_first_process, sharing
    from moe_lens.metrics import metrics_named
    from moe_lens.results import claim, provenance
    from moe_lens.storage import try_folder

    try_folder(out)
    if patching.patch is not None:
        others: dict[str, object] = {"--experts": experts, "--compare": compare, "--spare": spare, "--plan": plan}
        others |= {"--stop": stop, "--choose-dose": choose_dose, "--decoding": decoding != "plain"}
        patching.expect_alone(others, doing)
        data_of, place = (opening, reading, data, split, limit), (doing.positions, doing.within)
        MapRun(*data_of, *place, metrics, max_new_tokens, batch_size, out, seed).leave(patching)
        return
    controls, tasks = Controls.parse(control), Tasks.parse(data, spare)
    ends, answering = options.ends(stop), parse_decoding(decoding)
    mode, saved = doing.parsed(), doing.saved()
    more = metrics_named(metrics.split(",")) if metrics else []
    more = check_judged(more) if tasks.spared and more else more
    processes = connected()
    opening, asked_by = asking(opening.of_process(processes), tasks.all), Asked(reading, max_new_tokens, ends)
    loaded = {task: asked_by.load(task, split=split, limit=limit) for task in tasks.all}
    texts, first = [*(experts or []), *(compare or [])], tasks.targets[0]
    wanted = NamedExperts(texts, opening, scoring, asked_by, first, mode=mode, layers=doing.within, seed=seed)
    if not texts and mode.needs_experts and not saved:
        raise MoELensError("nothing is to be done: name experts with --experts, or a saved --intervention")
    if choose_dose:
        dose_choosing.expect_doses(mode, texts, saved)
    lens = opening.load()
    lens.batch_size, lens.progress = batch_size, processes.is_main_process
    wanted.check(lens)
    fitted = {task: asked_by.fit(examples, lens, of=f"{task}, {split}") for task, examples in loaded.items()}
    facts = mode.facts() | {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "stop": ends}
    facts |= opening.facts(lens) | reading.facts(*fitted.values())
    examples = {task: one.examples for task, one in fitted.items()}
    facts |= options.told_decoding(answering, [*chain.from_iterable(examples.values())])
    made_by = provenance(model=opening.model, delta=opening.delta, data=examples[first], seed=seed, facts=facts)
    digests = {name: one.intervention.digest for name, one in saved.items()}
    for asked_of in examples.values():
        check_metrics(more, asked_of, None)
    dev = {}
    if choose_dose:
        dev = dose_choosing.dev_examples(reading, lens, examples, split=dev_split, limit=dev_limit)
    by = dose_choosing.facts(dev)
    if plan is not None:
        wished = planned(tasks, mode, wanted.told(), digests, controls.told, max_new_tokens, more)
        wished |= by | {name: fact for name, fact in facts.items() if name == "decoding"}
        told = plan, wished, facts["weights"], [*chain.from_iterable(examples.values())]
        made_by["stage"] = from_first_process(lambda: hold_to_plan(*told))
    asked = tasks.facts(examples) | ({"saved": digests} if saved else {})
    asked |= {"metrics": [metric.name for metric in more]} if more else {}
    asked |= by
    claimed = made_by | {"experts": wanted.told(), "control": controls.told} | asked
    from_first_process(lambda: claim(out, claimed))
    own = {name: one.intervention for name, one in saved.items()}
    base = wanted.base if opening.delta is not None or scoring.base is not None else None
    limits = (max_new_tokens, ends, answering)
    with sharing():
        chosen = wanted.choose(lens, out)
        controls = agreed_on(controls.measured(lens, examples[first], mode))
        run = TaskRun(chosen, mode, own, more, controls, *limits, out, made_by | by, seed)
        runs = dose_choosing.choose_doses(run, saved, lens, dev, tasks) if dev else [run]
        found = merged([one.on_all(lens, base, examples, tasks.spared) for one in runs])
    if not processes.is_main_process:
        return
    made_by |= asked
    leave_masked(found, out, made_by, title=f"Answers under interventions ({mode})")
    if tasks.spared and found.rows["intervention"].nunique() > 1:
        leave_selectivity(found, tasks, out, made_by, more, seed=seed)


if __name__ == "__main__":
    console.run(main, shares=True)
