"""Evaluation from the command line: `python -m moe_lens.evaluate --help`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from typer import Option

from moe_lens.causal.evaluation import DEFAULT_METRICS
from moe_lens.causal.judge import Judge
from moe_lens.choosing.masking import named
from moe_lens.choosing.selection import choose, score_of
from moe_lens.commands import console, options
from moe_lens.errors import MoELensError
from moe_lens.lens.delta import weights_digest
from moe_lens.lens.interventions import MODES, Intervention
from moe_lens.lens.lens import MoELens
from moe_lens.lens.parallel import connected
from moe_lens.metrics import METRICS, metrics_named
from moe_lens.organism import planted_experts
from moe_lens.results import provenance, refuse_another_run, write_table


def main(
    model: Annotated[str, Option(help="'organism', 'organism:planted', a folder, or a hub id.")],
    data: options.Data,
    out: Annotated[
        Path,
        Option(
            help="Folder for answers.parquet and summary.parquet. The same command with the same folder goes on "
            "where an interrupted one stopped."
        ),
    ],
    delta: Annotated[Path | None, Option(help="Folder of a delta that moe_lens.tune wrote.")] = None,
    metrics: Annotated[str, Option(help=f"With commas, of {', '.join(METRICS)}.")] = ",".join(DEFAULT_METRICS),
    mask: Annotated[
        list[str] | None,
        Option(help="Answer with these experts masked too (several times): planted, FILE.json, or '3:5,7;4:0'."),
    ] = None,
    mode: Annotated[str, Option(help=f"How --mask masks: {', '.join(MODES)}.")] = "zero",
    judge: Annotated[
        str | None, Option(help="For acc_llm: base URL of a server that speaks the OpenAI chat protocol, with its /v1.")
    ] = None,
    judge_model: Annotated[str | None, Option(help="The judge's name on that server.")] = None,
    split: Annotated[str, Option(help="Which split of a task or data set is answered.")] = "test",
    limit: Annotated[int | None, Option(min=1, help="Answer the first so many examples only.")] = None,
    columns: options.Columns = None,
    skip_bad: options.SkipBad = False,
    max_length: options.MaxLength = None,
    too_long: options.HowTooLong = "drop",
    batch_size: Annotated[int, Option(min=1, help="Examples per batch; halved where memory is too small.")] = 32,
    max_new_tokens: Annotated[int, Option(min=1, help="Longest answer, in tokens.")] = 16,
    dtype: Annotated[str | None, Option(help="float32, bfloat16 or float16; default the checkpoint's own.")] = None,
    device: Annotated[str | None, Option(help="As transformers' device_map: cpu, cuda, auto, …")] = None,
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Run the Python code that some models bring beside their weights.")
    ] = False,
    seed: Annotated[int, Option(min=0, help="Of the bootstrap and the permutation tests.")] = 0,
) -> None:
    """Score a model's answers, as it is and with experts masked.

    For example, on the packaged model:

    \b
        python -m moe_lens.evaluate --model organism --data swap --metrics em,f1,memory --out RUN/evaluation

    Several processes share the work: torchrun --nproc-per-node 2 -m moe_lens.evaluate …
    """
    names = [metric.name for metric in metrics_named(metrics.split(","))]
    asked = _judge(judge, judge_model, out)
    interventions = _interventions(mask or [], mode, model)
    reading = options.Reading(columns, skip_bad, max_length, too_long)
    loaded = reading.load(data, split=split, limit=limit)
    processes = connected()
    if device is None and processes.num_processes > 1:
        device = "cpu" if processes.device.type == "cpu" else str(processes.device)
    lens = MoELens.from_pretrained(
        model,
        delta=delta,
        dtype=console.dtype_named(dtype),
        device_map=device,
        trust_remote_code=trust_remote_code,
    )
    fitted = reading.fit(loaded, lens.tokenizer, of=data)
    facts = {"dtype": dtype, "mode": mode, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    facts |= reading.facts(fitted) | {"weights": weights_digest(lens.module)}
    made_by = provenance(model=model, delta=delta, data=fitted.examples, facts=facts)
    refuse_another_run(out / "answers.parquet", made_by)
    found = lens.evaluate(
        fitted.examples,
        interventions,
        metrics=names,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        judge=asked,
        out=out,
        made_by=made_by,
        progress=processes.is_main_process,
        seed=seed,
    )
    if not processes.is_main_process:
        return
    made_by |= {"seed": seed, "metrics": names, "judge": judge_model}
    write_table(found.answers, out / "answers.parquet", made_by)
    write_table(found.summary, out / "summary.parquet", made_by)
    console.show(found.summary, title=f"{len(fitted.examples)} examples of {data}")
    print(f"written to {out}: answers.parquet, summary.parquet")


def _judge(base_url: str | None, name: str | None, out: Path) -> Judge | None:
    """The judge of --judge and --judge-model."""
    if (base_url is None) != (name is None):
        raise MoELensError("--judge and --judge-model belong together; give both or neither")
    return None if base_url is None else Judge(name, base_url, cache=out / "judge")


def _interventions(masks: Sequence[str], mode: str, model: str) -> dict[str, Intervention]:
    """An intervention for each --mask, which names experts without a score."""
    if mode not in MODES:
        raise MoELensError(f"--mode must be one of {', '.join(MODES)}; got {mode!r}")
    choices = []
    for mask in masks:
        if score_of(mask) is not None:
            raise MoELensError(f"--mask takes no scores; give {mask!r} to python -m moe_lens.intervene")
        choices += choose(mask, tables={}, planted=lambda: planted_experts(model))
    return named(choices, mode)


if __name__ == "__main__":
    console.run(main)
