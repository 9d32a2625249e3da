"""Sweeps over single experts against one whole run for each, in turns: what resuming and screening save, how exactly.

    python analyses/benchmarks/sweep.py --out RUN/benchmark
    python analyses/benchmarks/sweep.py --model mid --every 16 --limit 32 --repeats 1 --out RUN/mid

On a packaged model, or on `mid`: a random OLMoE of 8 layers, width 512 and 64 experts, 8 of which each token gets.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig
from turns import compared, in_turns
from typer import Exit, Option

from moe_lens import ExpertSet, MoELens, load_examples
from moe_lens.causal import Screened, screened_effects
from moe_lens.commands import console
from moe_lens.lens.interventions import MODES, parse_mode
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
    """Time each in turns; print its CPU time beside the whole runs', medians and quartiles, and how far it is off.

    Screening takes the experts of all layers, whatever --every is, and its recall is what its own sample says of it.
    """
    try_folder(out)
    lens = opened(model)
    examples, rows, off, recalls = load_examples("swap", limit=limit), [], {}, {}
    for mode in modes.split(","):
        parsed = parse_mode(mode)
        sets = [ExpertSet.of({n: [e]}) for n in lens.architecture.moe_layers for e in experts(lens, every)]
        masks = [parsed.on(own, parsed.doses[0]) for own in sets]
        found: dict[str, Any] = {}

        def whole(masks=masks, found=found) -> None:
            of_each = []
            for mask in masks:
                with lens.intervene(mask):
                    of_each.append(lens.answer_log_probabilities(examples, batch_size=batch_size, progress=False))
            found["whole runs"] = np.array(of_each)

        def resumed(masks=masks, found=found) -> None:
            several = lens.answer_log_probabilities_under(examples, masks, batch_size=batch_size, progress=False)
            found["resumed"] = np.array(several)

        def screened(mode=mode, found=found) -> None:
            found["screened"] = screened_effects(lens, examples, mode=mode, batch_size=batch_size, progress=False)

        ways: dict[str, Callable[[], None]] = {"whole runs": whole, "resumed": resumed}
        if mode in MODES:
            ways["screened"] = screened
        rows += [{"mode": mode, **row} for row in in_turns(ways, repeats, lens.module.device.type)]
        off[mode], recalls[mode] = np.abs(found["whole runs"] - found["resumed"]), found.get("screened")
    facts = {"batch_size": batch_size, "every": every, "threads": torch.get_num_threads()}
    write_table(pd.DataFrame(rows), out / "sweep.parquet", provenance(model=model, data=examples, facts=facts))
    table = compared(rows, ["mode"], clock="cpu_seconds")
    cpu = pd.DataFrame(rows).groupby(["mode", "way"])["cpu_seconds"].median()
    told = [_told(row.mode, row.way, cpu, off[row.mode], recalls[row.mode], every) for row in table.itertuples()]
    table = table.join(pd.DataFrame(told))
    console.show(table, title=f"{model}, {len(examples)} examples, {repeats} runs in turns, {facts}")
    if table["outcome"].any():
        raise Exit(1)


def _told(
    mode: str, way: str, cpu: pd.Series, off: np.ndarray, screened: Screened | None, every: int
) -> dict[str, object]:
    """What a way saves, and how exact it is; screening is of all experts, whole runs of one of `every`."""
    told: dict[str, object] = {"CPU s": round(cpu[mode, way], 1)}
    told["times faster"] = round(cpu[mode, "whole runs"] / cpu[mode, way] * (every if way == "screened" else 1), 2)
    if way == "resumed":
        return told | {"most nats off": f"{off.max():.1e}", "share off by 1e-4": f"{(off > 1e-4).mean():.2g}"}
    if way == "screened" and screened is not None:
        return told | {"recall": f"{screened.recall:.2f} [{screened.recall_low:.2f}, {screened.recall_high:.2f}]"}
    return told


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
