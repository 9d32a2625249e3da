"""What each kind of intervention and capture costs beside the plain model, in one run of ways in turns.

    python analyses/benchmarks/interventions.py --out RUN/interventions
    python analyses/benchmarks/interventions.py --models organism --turns 11 --out RUN/interventions

Plain is what one writes by hand with transformers: the same texts are tokenized, run and decoded. No sequence ends
before its last new token, but in the part where answers are as long as they are.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

import opened
import pandas as pd
import torch
from torch import Tensor
from training_cost import known
from turns import Row, compared, in_turns
from typer import Exit, Option

from moe_lens import Example, ExpertSet, Intervention, MoELens, MoELensError, Reroute, Zero, load_examples
from moe_lens.commands import console
from moe_lens.lens.greedy import Greedy
from moe_lens.lens.interventions import (
    AddVector,
    Bias,
    Force,
    LogitBias,
    Patch,
    ProjectOut,
    Renormalize,
    Replay,
    Rows,
    Run,
    Scale,
    SetTo,
    Steer,
    TopK,
)
from moe_lens.lens.record import CAPTURES
from moe_lens.results import provenance, write_table
from moe_lens.storage import try_folder

MODELS = ("organism", "mid", "tiny")
Stack = tuple[Intervention, ...]


def main(
    out: Annotated[Path, Option(help="Folder for interventions.parquet and, for docs/cost.md, summary.parquet.")],
    models: Annotated[str, Option(help=f"Some of {', '.join(MODELS)}.")] = "organism,mid",
    batch_size: Annotated[int, Option(help="Prompts in the one batch.")] = 32,
    tokens: Annotated[int, Option(help="Tokens of each prompt of a random model.")] = 64,
    new_tokens: Annotated[int, Option(help="Tokens generated after each prompt.")] = 16,
    turns: Annotated[int, Option(min=1, help="Turns that each way takes, after one that is not timed.")] = 7,
) -> None:
    """Time them by CPU time, and print each beside the plain model, medians and quartiles; exit code 1 if one fails."""
    try_folder(out)
    rows: list[Row] = []
    for model in known(models, MODELS, "--models"):
        lens, examples = opened_model(model, batch_size, tokens)
        parts = {"ended answers": answering(lens, examples)} if model == "organism" else {}
        parts |= {
            f"{new_tokens} tokens generated": generation(lens, examples, new_tokens),
            "forward pass": captures(lens, examples),
        }
        for what, ways in parts.items():
            rows += [{"model": model, "what": what, **row} for row in in_turns(ways, turns, "cpu")]
    facts = {"batch_size": batch_size, "new_tokens": new_tokens, "threads": torch.get_num_threads()}
    made_by = provenance(model=models, seed=0, facts=facts)
    write_table(pd.DataFrame(rows), out / "interventions.parquet", made_by)
    table = compared(rows, ["model", "what"], clock="cpu_seconds")
    write_table(beside_plain(table), out / "summary.parquet", made_by)
    console.show(table.drop(columns=["peak_gib", "added_gib"]), title=f"CPU time, {turns} turns, {facts}")
    if table["outcome"].str.startswith("failed").any():
        raise Exit(1)


def beside_plain(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each way, a column for each model: its time over the plain model's."""
    ways = table[table["way"] != "plain"]
    times = ways.set_index(["what", "way", "model"])["x_plain"]
    return times.unstack("model", sort=False).fillna("–").reset_index()


def opened_model(model: str, batch_size: int, tokens: int) -> tuple[MoELens, list[Example]]:
    """A model, opened, and examples for one batch."""
    if model == "organism":
        return MoELens.from_pretrained(model), load_examples("swap", limit=batch_size)
    lens = opened.random_lens(model, layers=None, device="cpu", dtype=torch.float32)
    return lens, opened.examples_of(lens, batch_size, tokens)


def plain_inputs(lens: MoELens, examples: list[Example]) -> Mapping[str, Tensor]:
    """The examples' texts as one left-padded batch, as one writes it by hand."""
    prompts = [lens.template.render(example, lens.tokenizer) for example in examples]
    special = not prompts[0].rendered
    lens.tokenizer.padding_side = "left"
    found = lens.tokenizer(
        [prompt.text for prompt in prompts], return_tensors="pt", padding=True, add_special_tokens=special
    )
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}


def plain_generation(lens: MoELens, examples: list[Example], new_tokens: int) -> list[str]:
    """What transformers generates of the examples' texts."""
    inputs = plain_inputs(lens, examples)
    with torch.no_grad():
        ids = lens.module.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return lens.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def answering(lens: MoELens, examples: list[Example], longest: int = 16) -> dict[str, opened.Way]:
    """Generation of answers that end after some tokens each, and of one among them that does not end."""
    return {
        "plain": lambda: plain_generation(lens, examples, longest),
        "lens.generate": lambda: lens.generate(
            examples, max_new_tokens=longest, batch_size=len(examples), progress=False
        ),
    }


def endless(lens: MoELens) -> MoELens:
    """The lens, whose model and tokenizer from now on know no end of sequence: so many new tokens in every run."""
    lens.tokenizer.eos_token = None
    lens.module.config.eos_token_id = lens.module.generation_config.eos_token_id = None
    if Greedy(lens.module, lens.tokenizer).ends:
        raise MoELensError("expected a model without an end of sequence, so that all runs make equally many tokens")
    return lens


def generation(lens: MoELens, examples: list[Example], new_tokens: int) -> dict[str, opened.Way]:
    """Greedy generation: transformers' own, the lens's, and under each kind of intervention in all layers."""
    lens = endless(lens)

    def generated(*interventions: Intervention) -> None:
        with lens.intervene(*interventions):
            lens.generate(examples, max_new_tokens=new_tokens, batch_size=len(examples), progress=False)

    kinds = interventions_of(lens, examples)
    return {
        "plain": lambda: plain_generation(lens, examples, new_tokens),
        "lens.generate": generated,
        **{name: partial(generated, *stack) for name, stack in kinds.items()},
    }


def interventions_of(lens: MoELens, examples: list[Example]) -> dict[str, Stack]:
    """Each kind, in all layers, on two experts of each that the examples use, or on what it is about."""
    [record] = lens.records(examples[:1], progress=False)
    used = {layer: routing.indices[0, -1, :2].tolist() for layer, routing in record.routing.items()}
    experts, source = ExpertSet.of(used), Run(lens, examples)
    up, down = (ExpertSet.of({layer: [pair[i]] for layer, pair in used.items()}) for i in (0, 1))
    architecture = lens.architecture
    draw = torch.Generator().manual_seed(0)
    vectors = {layer: torch.randn(architecture.d_model, generator=draw) / 100 for layer in used}
    logits = {layer: torch.randn(architecture.n_experts, generator=draw) for layer in used}
    others = [
        ExpertSet.of({layer: torch.randperm(architecture.n_experts, generator=draw)[:2].tolist() for layer in used})
        for _ in examples
    ]
    rows = {"Zero": Zero, "Reroute": Reroute, "Bias": lambda of: Bias(of, 1.0)}
    return {
        "Zero": (Zero(experts),),
        "Zero, while decoding": (Zero(experts, steps="decode"),),
        "Renormalize": (Renormalize(experts),),
        "Scale": (Scale(experts, 2.0),),
        "Reroute": (Reroute(experts),),
        "Force": (Force(experts),),
        "Bias": (Bias(experts, 1.0),),
        "LogitBias": (LogitBias(logits),),
        "TopK": (TopK(architecture.top_k - 1),),
        "Steer": (Steer(up, down),),
        "Replay": (Replay(source),),
        **{f"Rows of different {name}": (Rows(tuple(map(of, others))),) for name, of in rows.items()},
        "AddVector in each layer": tuple(AddVector(layer, vector) for layer, vector in vectors.items()),
        "SetTo, MoE output at the last position": (SetTo(vectors, what="moe_output", positions="last"),),
        "ProjectOut": (ProjectOut(vectors[max(used)]),),
        "Patch of the residual": (Patch(source),),
        "Patch of expert outputs": (Patch(source, what="expert_outputs"),),
    }


def captures(lens: MoELens, examples: list[Example]) -> dict[str, opened.Way]:
    """A forward pass over the prompts: plain, and with what `records` can capture."""

    def recorded(capture: tuple[str, ...], positions: str) -> None:
        for _ in lens.records(examples, capture=capture, positions=positions, batch_size=len(examples), progress=False):
            pass

    def plain() -> Tensor:
        return opened.bare(lens, plain_inputs(lens, examples))

    wanted = {
        "routing": (("routing",), "last"),
        "everything at the last position": (tuple(CAPTURES), "last"),
        "expert outputs at the last position": (("expert_outputs",), "last"),
        "expert outputs at all positions": (("expert_outputs",), "all"),
        "residual and MoE output at all positions": (("residual", "moe_output"), "all"),
    }
    return {"plain": plain, **{name: partial(recorded, *asked) for name, asked in wanted.items()}}


if __name__ == "__main__":
    console.run(main)
