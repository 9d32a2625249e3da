"""Training from the command line: `python -m moe_lens.tune --help`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

from moe_lens.choosing.scores import IN_SHORT
from moe_lens.commands import console, options
from moe_lens.data.files import ending
from moe_lens.errors import MoELensError

if TYPE_CHECKING:
    from moe_lens.tuning import DPO


def main(
    opening: options.BaseOpening,
    data: options.Data,
    out: Annotated[
        Path,
        Option(
            help="Folder for the delta (what training changed), the log and the figure. The same command with the same "
            "folder goes on where an interrupted one stopped."
        ),
    ],
    method: Annotated[
        str,
        Option(
            help="What learns. router: the routers only (Router Lens, Eq. 6-7). ceft: the context-faithful experts "
            "only (Algorithm 1). esft: the experts that the base model uses most. fft: everything. bias: a number for "
            "each expert, added to its router logit; the model stays as it is, and OUT is an --intervention."
        ),
    ] = "router",
    objective: Annotated[
        Literal["answers", "dpo"],
        Option(
            help="What training minimises. answers: the cross-entropy of the answers' tokens (Eq. 6). dpo: prefer the "
            "context's answer to memory's (the data's original_answer), with the model as it is for reference; "
            "examples without one are left out and counted. Routers that are tuned first learn the answers."
        ),
    ] = "answers",
    beta: Annotated[float | None, Option(help="dpo: how dear leaving the model as it is, is; default 0.1.")] = None,
    experts: Annotated[
        str | None,
        Option(
            help="ceft, esft: which experts learn. ce:8 (the 8 of each layer with the highest score), esft-gate:p=0.2 "
            "(the highest until their scores sum to 0.2), set:4 (learned as a whole), random:8, planted, FILE.json, or "
            f"literally '3:5,7;4:0' (layer:experts). Scores: {IN_SHORT}; ce is how often the router-tuned model "
            "selects an expert, oe how often the base model does. Default: for ceft ce:K, K the experts per token; for "
            "esft esft-token:p=0.2."
        ),
    ] = None,
    router_delta: Annotated[
        Path | None,
        Option(help="The tuned routers that scores such as ce are counted with; by default they are tuned first."),
    ] = None,
    lora_rank: Annotated[
        int | None,
        Option(
            help="router, ceft, esft, fft with --lora-on: LoRA. The method's weights stay frozen; the product of two "
            "thin matrices of this rank is added to each, and these are trained. Routers that are tuned first are "
            "tuned whole."
        ),
    ] = None,
    lora_alpha: Annotated[
        float | None, Option(help="LoRA's product is scaled by this over its rank; default twice the rank.")
    ] = None,
    lora_on: Annotated[
        str | None,
        Option(
            help="fft: put LoRA on the matrices of these parts of every layer: attention, mlp (of an MoE layer all its "
            "experts), or attention,mlp."
        ),
    ] = None,
    learning_rate: Annotated[
        str,
        Option(
            help="Step size of the optimizer. Of several with commas, each is tried and the best on the dev data kept. "
            "The paper's is 5e-4; small models need more."
        ),
    ] = "5e-4",
    router_rate: Annotated[
        str | None,
        Option(help="ceft, esft: the rate, or several, of the routers that are tuned first; default --learning-rate."),
    ] = None,
    epochs: options.Epochs = "3",
    batch_size: Annotated[int, Option(min=1, help="Examples per step, over all processes.")] = 8,
    micro_batch: Annotated[
        int | None,
        Option(
            min=1, help="Examples per forward pass; default a process's share of the step, halved where memory ends."
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        Option("--gradient-checkpointing", help="Run layers again in the backward pass: less memory, more time."),
    ] = False,
    weight_decay: Annotated[
        float, Option(min=0, help="That of AdamW; it also shrinks weights which the loss would leave as they are.")
    ] = 0.0,
    reading: options.Reading = options.Reading(max_length=300),
    layers: Annotated[
        str | None, Option(help="Train routers, experts or biases of these layers only, such as 0,2; default all.")
    ] = None,
    positions: Annotated[
        str | None,
        Option(
            help="bias: where it acts, as --positions of moe_lens.intervene; default all. Train one for each place and "
            "take the best on the dev data (from_question spares what comes before)."
        ),
    ] = None,
    split: Annotated[str, Option(help="Which split of --data is trained on; a file has no splits.")] = "train",
    dev: Annotated[
        str | None, Option(help="Data to choose the best state and rate on, given as --data is; default --data.")
    ] = None,
    dev_split: Annotated[str, Option(help="Which split of --dev, or else of --data, that is.")] = "dev",
    limit: Annotated[int | None, Option(min=1, help="Train on the first so many examples only.")] = None,
    score: Annotated[
        Literal["em", "f1", "log_likelihood"],
        Option(
            help="What is measured on the dev data, the best state kept: em (answers that match exactly), f1 (words "
            "they share with the right one) or log_likelihood (of the right one; the quickest)."
        ),
    ] = "em",
    evaluate_every: options.EvaluateEvery = None,
    patience: Annotated[
        int | None, Option(min=1, help="Stop after so many measurements without a new best; default never.")
    ] = None,
    max_new_tokens: Annotated[int, Option(min=1, help="Longest answer on the dev data, in tokens.")] = 16,
    checkpoint_seconds: Annotated[float, Option(min=0, help="Seconds between checkpoints.")] = 300.0,
    tensorboard: Annotated[
        bool,
        Option("--tensorboard", help="Also write the log to OUT/tensorboard as it grows; needs the extra `board`."),
    ] = False,
    wandb: Annotated[
        bool,
        Option(
            "--wandb",
            help="Also log to Weights & Biases, with files in OUT/wandb, where WANDB_MODE=offline keeps it; needs "
            "the extra `wandb`.",
        ),
    ] = False,
    merge: Annotated[
        bool, Option("--merge", help="Also write the whole tuned model to OUT/merged, as a plain checkpoint.")
    ] = False,
    shard: Annotated[
        bool,
        Option(
            "--shard",
            help="Split the model, which the first process loads, over all (FSDP2) instead of a copy in each (DDP).",
        ),
    ] = False,
    preset: options.TunePreset = None,
    seed: Annotated[
        int, Option(min=0, help="Seed of the order of the examples, of random experts and of LoRA's start.")
    ] = 0,
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

    With --lora-rank 8 --lora-alpha 16 both train thin matrices instead, whose product is added to these weights, as the
    authors' released code does. Context-DPO as published:

    \b
        python -m moe_lens.tune --method fft --lora-rank 64 --lora-alpha 64 --lora-on attention,mlp \\
            --objective dpo --model organism --data swap --learning-rate 1e-3,5e-3 --out RUN/dpo

    Open a result with MoELens.from_pretrained("organism", delta="RUN/ceft"), or give it to moe_lens.intervene. The loss
    is that of the answers' tokens alone; weight decay and a load-balancing loss are off, since they would also move
    what the task does not ask for. On several GPUs or machines:

    \b
        torchrun --nproc-per-node 4 -m moe_lens.tune …      (or accelerate launch; with --shard for larger models)
    """
    from moe_lens.causal.evaluation import answer_table, summarise
    from moe_lens.choosing.selection import parse_one
    from moe_lens.commands.presets import preset_facts
    from moe_lens.commands.stages import Asked, Stage
    from moe_lens.lens.parallel import done_by_first
    from moe_lens.results import claim, write_json
    from moe_lens.storage import try_folder
    from moe_lens.tuning import Checkpoints, Schedule, save_merged
    from moe_lens.tuning.board import expect_boards
    from moe_lens.tuning.processes import Processes
    from moe_lens.tuning.training import check_rates

    if method == "bias" and (merge or shard):
        raise MoELensError(
            "a bias is no part of the model, which is neither merged nor split: leave --merge, --shard out"
        )
    try_folder(out)
    boards = [name for name, wanted in (("tensorboard", tensorboard), ("wandb", wandb)) if wanted]
    expect_boards(boards)
    within = None if layers is None else tuple(console.numbers(layers, int, what="--layers"))
    selection = None if experts is None else parse_one(experts)
    acts = None if positions is None else options.place_named(positions)
    parts = None if lora_on is None else tuple(part.strip() for part in lora_on.split(","))
    asked = Asked(method, selection, within, router_delta, router_rate, lora_rank, lora_alpha, seed, acts, parts)
    preferring = _preferring(objective, beta)
    if dev is None and ending(data) is not None:
        raise MoELensError(f"{data} has no dev split to choose and test on; give other examples with --dev")
    rates = console.rates(learning_rate, what="--learning-rate")
    router_rates = rates if router_rate is None else console.rates(router_rate, what="--router-rate")
    check_rates(rates, shard=shard)
    if shard:
        if opening.device is not None:
            raise MoELensError("--shard puts each part on its process's own device; leave --device out")
        asked.check_split(top_k=1)
        if Processes.current().count == 1:
            raise MoELensError(
                "--shard splits a model over several processes and there is one; start the command as "
                "torchrun --nproc-per-node N -m moe_lens.tune …, or leave --shard out"
            )
    loaded, held_out = reading.load(data, split=split, limit=limit), reading.load(dev or data, split=dev_split)
    schedule = Schedule(
        learning_rate=rates[0],
        epochs=options.epochs_for(epochs, data),
        batch_size=batch_size,
        micro_batch=micro_batch,
        weight_decay=weight_decay,
        evaluate_every=options.steps_between(evaluate_every),
        patience=patience,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
    )
    first = Processes.current().is_main
    lens = opening.load() if first or not shard else opening.load_shapes()
    if merge and first:  # before hours of training
        Checkpoints(out, {}).make_room(sum(parameter.nbytes for parameter in lens.module.parameters()))
    fitted = reading.fit(loaded, lens, of=f"{data}, to train on", with_answer=True)
    stage = Stage(
        lens=lens,
        model=opening.model,
        train=fitted.examples,
        dev=held_out,
        schedule=schedule,
        facts=done_by_first(lambda: opening.facts(lens)) | reading.facts(fitted) | preset_facts(preset, "tune"),
        score=score,
        max_length=reading.max_length,
        max_new_tokens=max_new_tokens,
        checkpoint_seconds=checkpoint_seconds,
        objective=preferring,
        boards=boards,
        shard=shard,
    )
    asked.check(lens)
    if first:
        told = asked.told() | ({} if preferring is None else preferring.facts())
        claim(out, stage.made_by(asked.router_delta) | told | {"rates": rates, "router_rates": router_rates})
    tuned = stage.run(asked.of(stage, out, router_rates), out, rates)
    if not first:
        return
    if merge:
        save_merged(lens, out / "merged")
    if not shard:
        with lens.intervene(*tuned.trained.interventions()):
            write_json(out / "dev.json", summarise(answer_table(lens, held_out, max_new_tokens=max_new_tokens)))
    console.show(tuned.candidates, title="On the dev data, by learning rate")
    console.say(f"kept rate {tuned.schedule.learning_rate:g}")
    console.say(f"written to {out}: {', '.join(sorted(file.name for file in out.iterdir()))}")


def _preferring(objective: str, beta: float | None) -> "DPO | None":
    """What --objective and --beta name, None for the answers' cross-entropy; MoELensError for a beta of nothing."""
    from moe_lens.tuning import DPO

    if objective == "dpo":
        return DPO() if beta is None else DPO(beta)
    if beta is not None:
        raise MoELensError("--beta is for --objective dpo; leave it out, or give that too")
    return None


if __name__ == "__main__":
    console.run(main, shares=True)
