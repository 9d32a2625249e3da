"""Evaluation against plain `model.generate` loops over the same prompts, alternating in one run.

    python analyses/benchmarks/evaluation.py --out RUN/benchmark

The loops are what one writes by hand: one prompt at a time, and batches in the given order, left-padded.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
from turns import compared, in_turns
from typer import Exit, Option

from moe_lens import Example, MoELens, load_examples
from moe_lens.causal import evaluate
from moe_lens.commands import console
from moe_lens.data import FIGURE_10
from moe_lens.results import provenance, write_table
from moe_lens.storage import try_folder


def main(
    out: Annotated[Path, Option(help="Folder for evaluation.parquet.")],
    model: Annotated[str, Option(help="As in moe_lens.evaluate.")] = "organism",
    limit: Annotated[int, Option(help="Examples of each of the tasks swap, hops and summary.")] = 100,
    batch_size: Annotated[int, Option(help="Examples per batch.")] = 32,
    max_new_tokens: Annotated[int, Option(help="Longest answer, in tokens.")] = 16,
    repeats: Annotated[int, Option(help="Times that each is run, in turns.")] = 5,
) -> None:
    """Time each in turns, and print its time beside that of evaluation, medians and quartiles, and its answers."""
    try_folder(out)
    lens, examples = MoELens.from_pretrained(model), asked(limit)
    ways = answering(lens, examples, batch_size, max_new_tokens)
    said = {name: way() for name, way in ways.items()}
    device = lens.module.device.type
    rows = [{"what": "examples answered", **row} for row in in_turns(ways, repeats, device)]
    facts = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "threads": torch.get_num_threads()}
    write_table(pd.DataFrame(rows), out / "evaluation.parquet", provenance(model=model, data=examples, facts=facts))
    table = compared(rows, ["what"]).drop(columns="what").rename(columns={"x_plain": "x_evaluate"})
    medians = pd.DataFrame(rows).groupby("way")["seconds"].median()
    table["examples per second"] = len(examples) / table["way"].map(medians)
    same = {name: [a == b for a, b in zip(said[name], said["evaluate"], strict=True)] for name in ways}
    table["same answers"] = [sum(same[name]) / len(examples) for name in table["way"]]
    console.show(table, title=f"{len(examples)} examples, {repeats} runs in turns, {facts}")
    if table["outcome"].any():
        raise Exit(1)


def asked(limit: int) -> list[Example]:
    """So many examples of each of three tasks, mixed."""
    examples = [example for task in ("swap", "hops", "summary") for example in load_examples(task, limit=limit)]
    return [examples[i] for i in torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))]


def answering(
    lens: MoELens, examples: Sequence[Example], batch_size: int, max_new_tokens: int
) -> dict[str, Callable[[], list[str]]]:
    """What gives all their answers: the package's evaluation, and loops of `generate` over batches and over prompts."""
    prompts = [FIGURE_10.render(example, lens.tokenizer) for example in examples]
    special = not prompts[0].rendered

    def loop(size: int) -> list[str]:
        said = []
        for start in range(0, len(prompts), size):
            texts = [prompt.text for prompt in prompts[start : start + size]]
            inputs = lens.tokenizer(
                texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=special
            ).to(lens.module.device)
            inputs.pop("token_type_ids", None)
            with torch.no_grad():
                ids = lens.module.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            said += lens.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in said]

    def evaluated() -> list[str]:
        options = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "progress": False}
        return evaluate(lens, examples, **options).answers["prediction"].tolist()

    return {"evaluate": evaluated, "loop, batches": lambda: loop(batch_size), "loop, one by one": lambda: loop(1)}


if __name__ == "__main__":
    console.run(main)
