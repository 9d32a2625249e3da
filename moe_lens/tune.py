"""Training from the command line: `python -m moe_lens.tune --help`."""

from pathlib import Path
from typing import Annotated

from typer import Option

from moe_lens import console
from moe_lens.data import load_examples
from moe_lens.errors import MoELensError
from moe_lens.evaluation import answer_table, summarise
from moe_lens.lens import MoELens
from moe_lens.plots import tuning_figure
from moe_lens.results import provenance, write_json, write_table
from moe_lens.tuning import Schedule, TuneRouters, save_trained, tune

METHODS = ("router",)


def main(
    model: Annotated[str, Option(help="'organism', 'organism:planted', a folder, or a hub id.")],
    data: Annotated[
        str,
        Option(
            help="A task of the organism (swap, novel, …), a .json or .jsonl file of "
            "{context, question, answer}, or a hub data set."
        ),
    ],
    out: Annotated[Path, Option(help="Folder for the delta checkpoint, the log and the figure.")],
    method: Annotated[str, Option(help="router: train the routers only (Router Lens, Eq. 6-7).")] = "router",
    learning_rate: Annotated[
        str,
        Option(
            help="One, or several with commas: the best on the dev data is kept. "
            "The paper's is 5e-4; small models need more."
        ),
    ] = "5e-4",
    epochs: Annotated[int, Option(help="Passes over the training data.")] = 3,
    batch_size: Annotated[int, Option(help="Examples per step.")] = 8,
    max_length: Annotated[int, Option(help="Training examples with more tokens are left out.")] = 300,
    layers: Annotated[
        str | None, Option(help="Tune the routers of these layers only, such as 0,2; default all.")
    ] = None,
    split: Annotated[str, Option(help="Training split of a task or data set.")] = "train",
    dev: Annotated[str | None, Option(help="Dev data: a file or data set; default the dev split of --data.")] = None,
    dev_split: Annotated[str, Option(help="Its split.")] = "dev",
    limit: Annotated[int | None, Option(help="Train on the first so many examples only.")] = None,
    max_new_tokens: Annotated[int, Option(help="Longest answer on the dev data, in tokens.")] = 16,
    dtype: Annotated[str | None, Option(help="float32, bfloat16 or float16; default the checkpoint's own.")] = None,
    device: Annotated[str | None, Option(help="As transformers' device_map: cpu, cuda, auto, …")] = None,
    seed: Annotated[int, Option(help="Of the order of the examples.")] = 0,
) -> None:
    """Train a model and keep what changed as a small delta checkpoint.

    For example, tune the packaged model's routers to answer from the context, at the better of two rates:

    \b
        python -m moe_lens.tune --method router --model organism --data swap \\
            --learning-rate 5e-3,2e-2 --out RUN/router

    Open the result with MoELens.from_pretrained("organism", delta="RUN/router"), or give it to moe_lens.intervene.
    """
    if method not in METHODS:
        raise MoELensError(f"--method must be one of {', '.join(METHODS)}; got {method!r}")
    if dev is None and data.endswith((".json", ".jsonl")):
        raise MoELensError(f"{data} has no dev split to choose and test on; give other examples with --dev")
    train = load_examples(data, split=split, limit=limit)
    held_out = load_examples(dev or data, split=dev_split)
    chosen_layers = None if layers is None else console.numbers(layers, int, what="--layers")
    rates = console.numbers(learning_rate, float, what="--learning-rate")
    schedule = Schedule(epochs=epochs, batch_size=batch_size, seed=seed)
    out.mkdir(parents=True, exist_ok=True)

    lens = MoELens.from_pretrained(model, dtype=console.dtype_named(dtype), device_map=device)
    trained = TuneRouters(None if chosen_layers is None else tuple(chosen_layers))
    with trained.attached(lens) as trainable:
        print(f"{method}: {trainable}")
    tuned = tune(
        lens,
        train,
        held_out,
        trained,
        schedule,
        learning_rates=rates,
        out=out,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
    )

    facts = {
        **trained.facts(),
        "learning_rate": tuned.schedule.learning_rate,
        "epochs": epochs,
        "batch_size": batch_size,
        "max_length": max_length,
        "dropped": tuned.dropped,
    }
    made_by = provenance(model=model, data=train, seed=seed, facts=facts)
    save_trained(lens.module, tuned.trained, out, facts=made_by)
    write_table(tuned.log, out / "tuning.parquet", made_by)
    write_table(tuned.candidates, out / "learning_rates.parquet", made_by)
    console.save_figure(tuning_figure(tuned.log), out / "tuning.html")
    after = summarise(answer_table(lens, held_out, max_new_tokens=max_new_tokens))
    write_json(out / "dev.json", after)
    console.show(tuned.candidates, title="Exact match on the dev data, by learning rate")
    print(f"kept rate {tuned.schedule.learning_rate:g}; {tuned.dropped} examples were longer than {max_length} tokens")
    files = "delta.safetensors, delta.json, tuning.parquet, learning_rates.parquet, tuning.html, dev.json"
    print(f"written to {out}: {files}")


if __name__ == "__main__":
    console.run(main)
