"""Finding experts from the command line: `python -m moe_lens.find --help`."""

from pathlib import Path
from typing import Annotated

from typer import Option

from moe_lens.choosing.scores import IN_SHORT
from moe_lens.commands import console, options
from moe_lens.errors import MoELensError


def main(
    opening: options.Opening,
    data: options.Data,
    out: Annotated[
        Path,
        Option(
            help="Folder for scores.parquet, agreement.parquet, the answers with each set masked, the figures, and "
            "sets/NAME.json, which --experts takes. The same command with the same folder goes on where an "
            "interrupted one stopped."
        ),
    ],
    score: Annotated[
        list[str] | None,
        Option(
            help="What to find experts by (several times): set, a set that is learned as a whole; 'set:budget=16', "
            "'set:4;spare=closed_book', 'set:4;keep' (the experts that suffice), 'set:keep=0.9' (as few as do for that "
            "share of the answers); or a score: "
            f"{IN_SHORT}. Default: set, and all scores that the models allow, but not those that run the "
            "model once for every expert (effect)."
        ),
    ] = None,
    against: Annotated[
        str | None, Option(help="Other data: adds the contrast of --data and these, which needs no labels.")
    ] = None,
    spare: Annotated[
        str | None,
        Option(
            help="Tasks that are to be spared, with commas, such as closed_book: adds a learned set that spares them, "
            "and the matrix of what every set costs on every task, with a verdict of selectivity."
        ),
    ] = None,
    size: Annotated[
        int | None, Option(min=1, help="Experts per layer that each score chooses; default as many as a token takes.")
    ] = None,
    parts: Annotated[
        int,
        Option(
            min=0,
            help="The data are cut into so many parts, which are measured again and drawn anew, to see how many of "
            "the chosen experts return; 0 leaves that out, and half the cost. Learned sets say how many return in "
            "other searches.",
        ),
    ] = 10,
    scoring: options.Scoring = options.Scoring(),
    control: options.Control = "random:20",
    split: Annotated[str, Option(help="Which split of a task or data set the sets are judged on.")] = "test",
    limit: Annotated[int | None, Option(min=1, help="Judge on the first so many examples only.")] = None,
    reading: options.Reading = options.Reading(),
    batch_size: Annotated[int, Option(min=1, help="Examples per batch.")] = 32,
    max_new_tokens: Annotated[int, Option(min=1, help="Longest answer, in tokens.")] = 16,
    stop: options.Stop = None,
    seed: Annotated[int, Option(min=0, help="Of what is drawn: random sets, parts of the data, intervals.")] = 0,
) -> None:
    """Find the experts that do something, by several ways at once, and see which way to believe.

    For example, without labels and without tuning, what the packaged model reads contexts with, and how far learned
    sets, contrasts, attributions and usage agree on it:

    \b
        python -m moe_lens.find --model organism:planted --data novel --against swap \\
            --spare closed_book --out RUN/find

    Two lists of prompts, a line each, are enough for any ability; what the model itself says is then the right answer:

    \b
        python -m moe_lens.find --model MODEL --data german.txt --against english.txt \\
            --spare english.txt --out RUN/german

    Experts are ranked, or sets learned, on the train split; each choice is then masked (gating weight 0) on the test
    split beside random sets of the same shape. Of every way it is said how many of its experts return on other data,
    what it cost in seconds and passes, and, where pretraining planted experts, how many of them it found. Any set can
    be masked, forced or trained afterwards:

    \b
        python -m moe_lens.intervene --model organism:planted --data novel \\
            --experts RUN/find/sets/set_4.json --mode reroute --out RUN/rerouted
    """
    from moe_lens.choosing.agreement import agreement_table
    from moe_lens.choosing.controls import Controls
    from moe_lens.choosing.selection import parse
    from moe_lens.commands import finding
    from moe_lens.commands.masking_results import leave_masked, leave_selectivity
    from moe_lens.commands.masking_tasks import TaskRun, Tasks
    from moe_lens.commands.named_experts import NamedExperts
    from moe_lens.commands.prompt_lists import Asked, asking
    from moe_lens.decoding import PLAIN
    from moe_lens.lens.interventions import parse_mode
    from moe_lens.lens.parallel import agreed_on, connected, from_first_process, sharing
    from moe_lens.results import claim, provenance
    from moe_lens.storage import try_folder

    try_folder(out)
    controls, tasks, ends = Controls.parse(control), Tasks.parse(data, spare), options.ends(stop)
    first, mode = tasks.targets[0], parse_mode("zero")
    for name in score or ():
        if any(one.score is None for one in parse(finding.sized(name, 1))):
            raise MoELensError(f"--score names what ranks experts, or set; {name} is masked by moe_lens.intervene")
    processes = connected()
    opening, asked_by = asking(opening.of_process(processes), tasks.all), Asked(reading, max_new_tokens, ends)
    loaded = {task: asked_by.load(task, split=split, limit=limit) for task in tasks.all}
    lens = opening.load()
    lens.batch_size, lens.progress = batch_size, processes.is_main_process
    size = size or lens.architecture.top_k
    has_tuned = opening.delta is not None or scoring.base is not None
    has_memory = all(not isinstance(example, str) and example.memory for example in loaded[first])
    known = {"has_tuned": has_tuned, "has_memory": has_memory}
    texts = finding.texts_of(score, first, against=against, spare=tasks.spared, size=size, **known)
    wanted = NamedExperts(texts, opening, scoring, asked_by, first, mode=mode, seed=seed)
    wanted.check(lens)
    fitted = {task: asked_by.fit(examples, lens, of=f"{task}, {split}") for task, examples in loaded.items()}
    examples = {task: one.examples for task, one in fitted.items()}
    facts = mode.facts() | {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "stop": ends}
    facts |= opening.facts(lens) | reading.facts(*fitted.values())
    made_by = provenance(model=opening.model, delta=opening.delta, data=examples[first], seed=seed, facts=facts)
    asked = {"experts": wanted.told(), "control": controls.told, "parts": parts} | tasks.facts(examples)
    from_first_process(lambda: claim(out, made_by | asked))
    answers = (1 + len(wanted.selections) + controls.count) * sum(map(len, examples.values()))
    console.say(f"masking the sets and {controls.count} random ones will then take about {answers} answers")
    with sharing():
        finder = finding.Finder(lens, wanted.measuring(lens), out, size, parts, seed, lenient=not score)
        ranked = finder.ranked(wanted.scores)
        measured = [one for one in dict.fromkeys(wanted.selections) if one.score and one.score.name in ranked.tables]
        wanted.selections = measured
        chosen = wanted.chosen(lens, ranked.tables)
        masked = [finding.judged_by(*pair, lens) for pair in zip(wanted.selections, chosen, strict=True)]
        controls = agreed_on(controls.measured(lens, examples[first], mode))
        run = TaskRun(masked, mode, {}, [], controls, max_new_tokens, ends, PLAIN, out, made_by, seed)
        found = run.on_all(lens, wanted.base if has_tuned else None, examples, tasks.spared)
    if not processes.is_main_process:
        return
    finding.write_sets(chosen, out)
    made_by |= asked
    leave_masked(found, out, made_by, title="Answers with each set masked")
    if tasks.spared:
        leave_selectivity(found, tasks, out, made_by, [], seed=seed)
    rows = found.rows[found.rows["task"] == first]
    table = finding.found_table(wanted.selections, chosen, masked, ranked, rows, opening.model)
    pairs = zip(measured, chosen, strict=True)
    named = {one.name: ranked.tables[own.score.name] for own, one in pairs if own.score is not None}
    agreement = agreement_table(named, {one.name: one.experts for one in chosen})
    finding.leave_found(table, agreement, out, made_by)


if __name__ == "__main__":
    console.run(main, shares=True)
