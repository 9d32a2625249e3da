"""A paper-sized model with random weights, opened: what capture and masked generation cost beside the plain model.

    python analyses/benchmarks/full_size.py --out RUN/full_size
    python analyses/benchmarks/full_size.py --device cuda --out RUN/full_size_cuda

OLMoE-1B-7B takes 14 GB in bfloat16, on the CPU or on a GPU; --n-layers makes it smaller.
"""

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from typer import Option

from moe_lens import ExpertSet, MoELens, MoELensError, Zero
from moe_lens.architecture.paper_models import OLMOE
from moe_lens.commands import console
from moe_lens.lens.loading import load_tokenizer
from moe_lens.results import provenance, write_table

SENTENCE = "the capital of France is Paris and the river that runs through it is the Seine . "


def main(
    out: Annotated[Path, Option(help="Folder for full_size.parquet.")],
    device: Annotated[str, Option(help="cpu or cuda.")] = "cpu",
    n_layers: Annotated[int, Option(help="Decoder layers; the real model has 16.")] = 16,
    batch_size: Annotated[int, Option(help="Prompts in the one batch.")] = 4,
    repeats: Annotated[int, Option(help="The fastest of so many runs counts.")] = 3,
    new_tokens: Annotated[int, Option(help="Tokens generated after each prompt.")] = 8,
) -> None:
    """Time a plain forward pass, a captured one, and plain and masked generation."""
    if device == "cuda" and not torch.cuda.is_available():
        raise MoELensError("--device cuda needs a GPU, and torch sees none; use --device cpu")
    torch.manual_seed(0)
    started = time.perf_counter()
    config = CONFIG_MAPPING[OLMOE.model_type](**OLMOE.settings | {"num_hidden_layers": n_layers})
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    module.generation_config.eos_token_id = None  # random weights may not end early: every run makes new_tokens
    lens = MoELens.from_pretrained(module, load_tokenizer("organism"))
    rows = [{"what": "build", "seconds": time.perf_counter() - started, "peak_gib": _peak(device)}]
    print(f"built in {rows[0]['seconds']:.0f} s", flush=True)
    texts = [SENTENCE] * batch_size
    ids = lens.tokenizer(texts, return_tensors="pt")["input_ids"].to(device)

    logits, record = lens.run_with_cache(texts, positions="last")
    with torch.no_grad():
        bare = module(ids, use_cache=False, logits_to_keep=1).logits  # a head may round by its number of positions
    assert torch.equal(logits, bare), "capture changed the logits"
    masked = ExpertSet.of({layer: r.indices[0, -1, :2].tolist() for layer, r in record.routing.items()})
    with lens.intervene(Zero(masked)):
        changed, record = lens.run_with_cache(texts, positions="last")
    assert not torch.equal(changed, logits), "masking changed nothing"
    for layer, routing in record.routing.items():
        assert not routing.weights[torch.isin(routing.indices.cpu(), torch.tensor(masked[layer]))].any(), layer

    def generate() -> None:
        lens.generate(texts, max_new_tokens=new_tokens, batch_size=batch_size, progress=False)

    def generate_masked() -> None:
        with lens.intervene(Zero(masked)):
            generate()

    plain = torch.no_grad()(lambda: module(ids, use_cache=False, logits_to_keep=1))
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 1}
    runs = {
        "forward": plain,
        "captured forward": lambda: lens.run_with_cache(texts, positions="last"),
        "generation": lambda: module.generate(ids, attention_mask=torch.ones_like(ids), **options),
        "lens.generate": generate,
        "masked lens.generate": generate_masked,
    }
    for what, run in runs.items():
        rows.append({"what": what, **_fastest(run, repeats, device), "peak_gib": _peak(device)})
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    spent = table.set_index("what")["cpu_seconds" if device == "cpu" else "seconds"]
    table["ratio"] = table["what"].map(
        {name: spent[name] / spent["forward" if "forward" in name else "generation"] for name in runs}
    )
    facts = {"weights": "random", "dtype": "bfloat16", "n_layers": n_layers, "device": device}
    facts |= {"parameters": sum(p.numel() for p in module.parameters())}
    facts |= {"tokens": list(ids.shape), "new_tokens": new_tokens}
    write_table(table, out / "full_size.parquet", provenance(model=OLMOE.name, seed=0, facts=facts))
    print(f"{facts['parameters']:,} parameters")
    console.show(table, title=f"{OLMOE.name} in bfloat16, tokens {list(ids.shape)}, {device}")


def _fastest(run: Callable[[], Any], repeats: int, device: str) -> dict[str, float]:
    """The least time on the clock, and the least work of the CPU, which other processes do not blur."""
    clock, work = [], []
    for _ in range(repeats):
        started, worked = time.perf_counter(), time.process_time()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        clock.append(time.perf_counter() - started)
        work.append(time.process_time() - worked)
    return {"seconds": min(clock), "cpu_seconds": min(work)}


def _peak(device: str) -> float:
    """The most memory held so far, GiB: of the GPU by torch, else of the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


if __name__ == "__main__":
    console.run(main)
