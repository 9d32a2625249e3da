"""Training from the command line: `python -m moe_lens.tune --help`."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from typer import Option

from moe_lens import console, options
from moe_lens.data import Example
from moe_lens.data.files import ending
from moe_lens.delta import weights_digest
from moe_lens.errors import MoELensError
from moe_lens.evaluation import answer_table, summarise
from moe_lens.lens import MoELens
from moe_lens.organism import planted_experts
from moe_lens.plots import tuning_figure
from moe_lens.results import provenance, read_if_made_by, write_json, write_table
from moe_lens.scores import Score
from moe_lens.tuning import (
    Checkpoints,
    Method,
    Schedule,
    TuneAll,
    Tuned,
    TuneExperts,
    TuneRouters,
    router_parameters,
    save_trained,
    tune,
)
from moe_lens.tuning.choosing import choose_experts, expert_scores, restored, score_of, with_delta
from moe_lens.tuning.processes import Processes

METHODS = ("router", "ceft", "esft", "fft")
ESFT_DEFAULT = "esft-token:p=0.2"


def main(
    model: Annotated[str, Option(help="'organism', 'organism:planted', a folder, or a hub id.")],
    data: options.Data,
    out: Annotated[
        Path,
        Option(
            help="Folder for the delta, the log and the figure. The same command with the same folder goes on where an "
            "interrupted one stopped."
        ),
    ],
    method: Annotated[
        str,
        Option(
            help="router: the routers only (Router Lens, Eq. 6-7). ceft: the context-faithful experts only "
            "(Algorithm 1). esft: the experts that the base model uses most. fft: everything."
        ),
    ] = "router",
    experts: Annotated[
        str | None,
        Option(
            help="ceft, esft: which experts. ce:8 (the 8 highest per layer by a score of moe_lens.intervene), "
            "esft-gate:p=0.2 (the highest until their scores sum to 0.2), random:8, planted, FILE.json, or literally "
            "'3:5,7;4:0'. Default: ceft ce:K with K the experts per token; esft esft-token:p=0.2."
        ),
    ] = None,
    router_delta: Annotated[
        Path | None,
        Option(help="The tuned routers that scores such as ce are counted with; by default they are tuned first."),
    ] = None,
    learning_rate: Annotated[
        str,
        Option(
            help="One, or several with commas: the best on the dev data is kept. "
            "The paper's is 5e-4; small models need more."
        ),
    ] = "5e-4",
    router_rate: Annotated[
        str | None, Option(help="The same for the routers that are tuned first; default as --learning-rate.")
    ] = None,
    epochs: Annotated[int, Option(help="Passes over the training data.")] = 3,
    batch_size: Annotated[int, Option(help="Examples per step, over all processes.")] = 8,
    micro_batch: Annotated[
        int | None, Option(help="Examples per forward pass, to save memory; default a process's share of the step.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, Option("--gradient-checkpointing", help="Less memory for a third more time.")
    ] = False,
    weight_decay: Annotated[float, Option(help="AdamW's.")] = 0.0,
    columns: options.Columns = None,
    skip_bad: options.SkipBad = False,
    max_length: options.MaxLength = 300,
    too_long: options.HowTooLong = "drop",
    layers: Annotated[
        str | None, Option(help="Train routers or experts of these layers only, such as 0,2; default all.")
    ] = None,
    split: Annotated[str, Option(help="Training split of a task or data set.")] = "train",
    dev: Annotated[str | None, Option(help="Dev data: a file or data set; default the dev split of --data.")] = None,
    dev_split: Annotated[str, Option(help="Its split.")] = "dev",
    limit: Annotated[int | None, Option(help="Train on the first so many examples only.")] = None,
    score: Annotated[
        str, Option(help="What is measured on the dev data, the best state kept: em, f1 or log_likelihood.")
    ] = "em",
    evaluate_every: Annotated[int | None, Option(help="Steps between measurements; default one per epoch.")] = None,
    patience: Annotated[int | None, Option(help="Stop after so many measurements without a new best.")] = None,
    max_new_tokens: Annotated[int, Option(help="Longest answer on the dev data, in tokens.")] = 16,
    checkpoint_seconds: Annotated[float, Option(help="Time between checkpoints.")] = 300.0,
    merge: Annotated[
        bool, Option("--merge", help="Also write the whole tuned model to OUT/merged, as a plain checkpoint.")
    ] = False,
    shard: Annotated[
        bool, Option("--shard", help="Split the model over the processes (FSDP2) instead of a copy in each (DDP).")
    ] = False,
    dtype: Annotated[str | None, Option(help="float32, bfloat16 or float16; default the checkpoint's own.")] = None,
    device: Annotated[
        str | None, Option(help="As transformers' device_map: cpu, cuda, or auto to spread a model over several GPUs.")
    ] = None,
    seed: Annotated[int, Option(help="Of the order of the examples and of random experts.")] = 0,
) -> None:
    """Train a model and keep what changed as a small delta checkpoint.

    For example, tune the packaged model's routers to answer from the context, at the better of two rates:

    \b
        python -m moe_lens.tune --method router --model organism --data swap \\
            --learning-rate 5e-3,2e-2 --out RUN/router

    Then train only the experts that the tuned routers select (without --router-delta, both stages run):

    \b
        python -m moe_lens.tune --method ceft --model organism --data swap --experts ce:4 \\
            --router-delta RUN/router --learning-rate 2e-3 --out RUN/ceft

    Open a result with MoELens.from_pretrained("organism", delta="RUN/ceft"), or give it to moe_lens.intervene. The
    loss is that of the answers' tokens alone; weight decay and a load-balancing loss are off, since they would also
    move what the task does not ask for. On several GPUs or machines:

    \b
        torchrun --nproc-per-node 4 -m moe_lens.tune …      (or accelerate launch; with --shard for larger models)
    """
    if method not in METHODS:
        raise MoELensError(f"--method must be one of {', '.join(METHODS)}; got {method!r}")
    if (experts or router_delta) and method not in ("ceft", "esft"):
        raise MoELensError(f"--experts and --router-delta are for ceft and esft; --method is {method}")
    if dev is None and ending(data) is not None:
        raise MoELensError(f"{data} has no dev split to choose and test on; give other examples with --dev")
    reading = options.Reading(columns, skip_bad, max_length, too_long)
    loaded = reading.load(data, split=split, limit=limit)
    held_out = reading.load(dev or data, split=dev_split)
    rates = console.numbers(learning_rate, float, what="--learning-rate")
    router_rates = console.numbers(router_rate or learning_rate, float, what="--router-rate")
    schedule = Schedule(
        learning_rate=rates[0],
        epochs=epochs,
        batch_size=batch_size,
        micro_batch=micro_batch,
        weight_decay=weight_decay,
        evaluate_every=evaluate_every,
        patience=patience,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
    )
    Checkpoints(out, {}).make_room(0)  # before minutes of loading

    lens = MoELens.from_pretrained(model, dtype=console.dtype_named(dtype), device_map=device)
    kept = lens.architecture.moe_layers if layers is None else tuple(console.numbers(layers, int, what="--layers"))
    fitted = reading.fit(loaded, lens.tokenizer, of=f"{data}, to train on", with_answer=True)
    stage = _Stage(
        lens,
        fitted.examples,
        held_out,
        schedule,
        {"model": model, "data": fitted.examples, "seed": seed},
        reading.facts(fitted),
        {
            "score": score,
            "max_length": max_length,
            "max_new_tokens": max_new_tokens,
            "checkpoint_seconds": checkpoint_seconds,
        },
    )
    if method == "router":
        what: Method = TuneRouters(None if layers is None else kept)
    elif method == "fft":
        what = TuneAll()
    else:
        specification = experts or (f"ce:{lens.architecture.top_k}" if method == "ceft" else ESFT_DEFAULT)
        score_by = score_of(specification)
        table = None
        if score_by is not None:
            routers = partial(_with_tuned_routers, stage, out / "router", router_rates, router_delta)
            table = _score_table(stage, score_by, routers, out / "experts.parquet", router_delta, router_rates)
        chosen = choose_experts(
            specification,
            table=table,
            planted=lambda: planted_experts(model),
            layers=kept,
            n_experts=lens.architecture.n_experts,
            seed=seed,
        )
        what = TuneExperts(chosen, name=method)
    tuned = stage.run(what, out, rates, shard=shard)
    if not Processes.current().is_main:
        return
    stage.write(tuned, what, out)
    if merge:
        _merge(lens, out / "merged")
    if not shard:
        write_json(out / "dev.json", summarise(answer_table(lens, held_out, max_new_tokens=max_new_tokens)))
    console.show(tuned.candidates, title="On the dev data, by learning rate")
    print(f"kept rate {tuned.schedule.learning_rate:g}")
    print(f"written to {out}: {', '.join(sorted(file.name for file in out.iterdir()))}")


@dataclass(frozen=True)
class _Stage:
    """What the trainings of one command share. origin, facts: of the provenance. options: of `tune`."""

    lens: MoELens
    train: Sequence[Example]
    dev: Sequence[Example]
    schedule: Schedule
    origin: Mapping[str, Any]
    facts: Mapping[str, Any]
    options: Mapping[str, Any]

    def run(self, what: Method, out: Path, rates: Sequence[float], *, shard: bool = False) -> Tuned:
        """Train, or go on in `out`."""
        return tune(
            self.lens,
            self.train,
            self.dev,
            what,
            self.schedule,
            learning_rates=rates,
            out=out,
            shard=shard,
            **self.options,
        )

    def write(self, tuned: Tuned, what: Method, out: Path) -> dict:
        """The delta, the log and the figure; returns their provenance."""
        facts = {
            **what.facts(),
            **{name: value for name, value in asdict(tuned.schedule).items() if name != "seed"},
            **self.facts,
            "trainable": tuned.trained.count,
        }
        made_by = provenance(**self.origin, facts=facts)
        save_trained(self.lens.module, tuned.trained, out, facts=made_by)
        write_table(tuned.log, out / "tuning.parquet", made_by)
        write_table(tuned.candidates, out / "learning_rates.parquet", made_by)
        write_json(out / "cost.json", {"seconds": tuned.seconds, "trainable": tuned.trained.count})
        console.save_figure(tuning_figure(tuned.log), out / "tuning.html")
        return made_by


@contextmanager
def _with_tuned_routers(
    stage: _Stage, folder: Path, rates: Sequence[float], delta: Path | None
) -> Iterator[None]:
    """Inside the block the lens's routers are tuned: those of `delta`, or else tuned now and kept in `folder`."""
    if delta is not None:
        with with_delta(stage.lens, delta):
            yield
        return
    routers = TuneRouters()
    with restored(stage.lens, router_parameters(stage.lens)):
        tuned = stage.run(routers, folder, rates)
        if Processes.current().is_main:
            stage.write(tuned, routers, folder)
        yield


def _score_table(
    stage: _Stage,
    score: Score,
    routers: Callable[[], AbstractContextManager[None]],
    file: Path,
    delta: Path | None,
    rates: Sequence[float],
) -> pd.DataFrame:
    """The experts' scores, from `file` if they were counted the same way before."""
    by = {"score": score.name, "weights": weights_digest(stage.lens.module)}
    if score.needs_tuned and delta is None:
        by["routers"] = {"rates": list(rates), "schedule": repr(stage.schedule), **stage.options}
    made_by = provenance(**stage.origin, delta=delta, facts=by)
    table = read_if_made_by(file, made_by)
    Processes.current().wait()  # all have looked before the first writes
    if table is None:
        table = expert_scores(score, stage.lens, stage.train, routers)
        if Processes.current().is_main:
            write_table(table, file, made_by)
    return table


def _merge(lens: MoELens, folder: Path) -> None:
    """The whole model as a plain checkpoint; what is there stays until all of it is written."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    lens.module.save_pretrained(unfinished)
    lens.tokenizer.save_pretrained(unfinished)
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)


if __name__ == "__main__":
    console.run(main)
