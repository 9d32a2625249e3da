"""Peak memory and time of context attention (CAG) on one long prompt, against eager attention's full maps.

    python analyses/benchmarks/attention_memory.py --out RUN/benchmark

The model is a random one of the organism's family. Each way runs in a process of its own, in turns; memory is what the
run adds to the process's peak. It is an error if both ways do not give the same attention mass.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig
from turns import timed
from typer import Option

from moe_lens import AttentionMass, Example, MoELens, MoELensError
from moe_lens.commands import console
from moe_lens.data import encode
from moe_lens.lens.loading import load_tokenizer
from moe_lens.results import provenance, write_table
from moe_lens.storage import try_folder

WAYS = ("rows, nnsight", "forward pass alone", "eager, all maps")


def main(
    out: Annotated[Path, Option(help="Folder for attention_memory.parquet.")],
    tokens: Annotated[int, Option(help="Length of the prompt.")] = 2000,
    layers: Annotated[int, Option(help="Decoder layers.")] = 8,
    heads: Annotated[int, Option(help="Attention heads.")] = 8,
    repeats: Annotated[int, Option(help="Processes of each way.")] = 3,
    way: Annotated[str, Option(hidden=True)] = "",
) -> None:
    """Print MiB, seconds (medians over processes) and their ratios to the rows."""
    if way:
        print(json.dumps(measured(way, tokens, layers, heads)))
        return
    try_folder(out)
    options = {"tokens": tokens, "layers": layers, "heads": heads}
    command = [sys.executable, __file__, "--out", str(out), *(f"--{name}={value}" for name, value in options.items())]
    rows = []
    for _ in range(repeats):
        for name in WAYS:
            done = subprocess.run([*command, "--way", name], capture_output=True, text=True, check=True)
            rows.append({"way": name, **options, **json.loads(done.stdout.splitlines()[-1])})
    table = pd.DataFrame(rows)
    masses = table["mass"].dropna()  # a forward pass alone has none
    if not np.allclose(masses, masses.iloc[0], rtol=1e-4):
        found = masses.groupby(table["way"]).unique().to_dict()
        raise MoELensError(f"expected the same attention mass from all ways; got {found}")
    write_table(table, out / "attention_memory.parquet", provenance(model="random", seed=0, facts=options))
    medians = table.groupby("way", sort=False)[["mib", "seconds", "mass"]].median().reset_index()
    for column in ("mib", "seconds"):
        medians[f"{column}_ratio"] = medians[column] / medians[column].iloc[0]
    console.show(medians, title=f"{tokens} tokens, {layers} layers of {heads} heads")


def measured(way: str, tokens: int, layers: int, heads: int) -> dict[str, float | None]:
    """What one way adds to this process's peak memory, its seconds, and the mean context mass it found."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer("organism")
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=2 * tokens,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        attn_implementation="eager" if way == "eager, all maps" else "sdpa",
    )
    lens = MoELens.from_pretrained(AutoModelForCausalLM.from_config(config).eval(), tokenizer)
    runs: dict[str, Callable[[Example], float | None]] = {
        "rows, nnsight": lambda example: by_rows(lens, example),
        "forward pass alone": lambda example: by_forward(lens, example, maps=False),
        "eager, all maps": lambda example: by_forward(lens, example, maps=True),
    }
    runs[way](prompt_of(tokenizer, 100))
    example = prompt_of(tokenizer, tokens)
    masses: list[float | None] = []
    found = timed(lambda: masses.append(runs[way](example)), "cpu")
    return {"mib": found["added"] / 2**20, "seconds": found["seconds"], "mass": masses[0]}


def by_rows(lens: MoELens, example: Example) -> float:
    """The mean context mass over layers, from the rows alone."""
    [mass] = lens.measure([example], AttentionMass(("context",)), progress=False)
    return float(mass.table()["mass"].mean())


def by_forward(lens: MoELens, example: Example, *, maps: bool) -> float | None:
    """The same from all maps, as transformers gives them; None of a forward pass without them."""
    encoded = encode(example, lens.tokenizer)
    with torch.no_grad():
        ids = torch.tensor([encoded.input_ids])
        output = lens.module(ids, output_attentions=maps, use_cache=False, logits_to_keep=1)
    if not maps:
        return None
    return float(torch.stack([layer[0, :, -1, encoded.context].sum(-1).mean() for layer in output.attentions]).mean())


def prompt_of(tokenizer, tokens: int) -> Example:
    """An example whose prompt has about so many tokens, more rather than fewer."""
    context = "The river runs by the town."
    one = len(tokenizer(" " + context)["input_ids"])
    return Example("long", " ".join([context] * (tokens // one + 1)), "What runs by the town?", ("river",))


if __name__ == "__main__":
    console.run(main)
