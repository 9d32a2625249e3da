"""Sweeps over single experts against one whole run for each, in turns: what resuming saves, and that it is exact.

    python analyses/benchmarks/sweep.py --out RUN/benchmark

On a packaged model, or on `mid`: a random OLMoE of 8 layers, width 512 and 64 experts, 8 of which each token gets.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig
from turns import compared, in_turns
from typer import Exit, Option

from moe_lens import ExpertSet, MoELens, load_examples
from moe_lens.commands import console
from moe_lens.lens.interventions import parse_mode
from moe_lens.results import provenance, write_table
from moe_lens.storage import try_folder

MID = {
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}


def main(
    out: Annotated[Path, Option(help="Folder for sweep.parquet.")],
    model: Annotated[str, Option(help="As in moe_lens.evaluate, or mid.")] = "organism",
    modes: Annotated[str, Option(help="What is done to each expert, as in --mode.")] = "zero,reroute,bias:2",
    limit: Annotated[int, Option(help="Examples of swap.")] = 64,
    every: Annotated[int, Option(help="Of the experts of each layer, one of so many.")] = 1,
    batch_size: Annotated[int, Option(help="Examples per batch.")] = 32,
    repeats: Annotated[int, Option(help="Times that each is run, in turns.")] = 3,
) -> None:
    """Time each in turns; print its CPU time beside the whole runs', medians and quartiles, and how far it is off."""
    try_folder(out)
    lens = opened(model)
    examples, rows, off = load_examples("swap", limit=limit), [], {}
    for mode in modes.split(","):
        parsed = parse_mode(mode)
        sets = [ExpertSet.of({n: [e]}) for n in lens.architecture.moe_layers for e in experts(lens, every)]
        masks = [parsed.on(own, parsed.doses[0]) for own in sets]
        found: dict[str, np.ndarray] = {}

        def whole(masks=masks, found=found) -> None:
            of_each = []
            for mask in masks:
                with lens.intervene(mask):
                    of_each.append(lens.answer_log_probabilities(examples, batch_size=batch_size, progress=False))
            found["whole runs"] = np.array(of_each)

        def resumed(masks=masks, found=found) -> None:
            several = lens.answer_log_probabilities_under(examples, masks, batch_size=batch_size, progress=False)
            found["resumed"] = np.array(several)

        ways = {"whole runs": whole, "resumed": resumed}
        rows += [{"mode": mode, **row} for row in in_turns(ways, repeats, lens.module.device.type)]
        off[mode] = np.abs(found["whole runs"] - found["resumed"])
    facts = {"batch_size": batch_size, "every": every, "threads": torch.get_num_threads()}
    write_table(pd.DataFrame(rows), out / "sweep.parquet", provenance(model=model, data=examples, facts=facts))
    table = compared(rows, ["mode"], clock="cpu_seconds")
    table["most nats off"] = [off[mode].max() for mode in table["mode"]]
    table["share off by 1e-4"] = [(off[mode] > 1e-4).mean() for mode in table["mode"]]
    medians = pd.DataFrame(rows).groupby(["mode", "way"])["cpu_seconds"].median().unstack()
    table["times faster"] = [
        medians.loc[mode, "whole runs"] / medians.loc[mode, way] for mode, way in table[["mode", "way"]].values
    ]
    console.show(table, title=f"{model}, {len(examples)} examples, {repeats} runs in turns, {facts}")
    if table["outcome"].any():
        raise Exit(1)


def opened(model: str) -> MoELens:
    """A lens on a packaged model, or on a random one of a middle size with the organism's tokenizer."""
    if model != "mid":
        return MoELens.from_pretrained(model)
    tokenizer = MoELens.from_pretrained("organism").tokenizer
    torch.manual_seed(0)
    config = OlmoeConfig(**MID, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=None)
    return MoELens(AutoModelForCausalLM.from_config(config).eval(), tokenizer)


def experts(lens: MoELens, every: int) -> range:
    """The experts of a layer that are taken."""
    return range(0, lens.architecture.n_experts, every)


if __name__ == "__main__":
    console.run(main)
