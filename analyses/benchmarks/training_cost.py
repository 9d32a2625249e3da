"""What a training step costs by each method, in time and memory, beside full fine-tuning and PEFT's LoRA.

    python analyses/benchmarks/training_cost.py --out RUN/training_cost
    python analyses/benchmarks/training_cost.py --size olmoe --device cuda --out RUN/training_cost_cuda

Every case has two processes of its own in every round, one for time and one for memory, and the rounds follow each
other, so that what else the machine does falls on all alike. A case's time is that of its fastest step in any round,
since whatever disturbs a step makes it longer; its memory is the median. Weights, tokens and chosen experts are random:
k of E experts are sent k/E of the tokens.
"""

import os
import resource
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import pandas as pd
import peft
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from typer import Option

from moe_lens import ExpertSet, MoELens, MoELensError, console
from moe_lens.architecture.paper_models import OLMOE
from moe_lens.data import Batch, Encoded, collate
from moe_lens.loading import load_tokenizer
from moe_lens.results import provenance, write_table
from moe_lens.tuning import TuneAll, TuneExperts, TuneLowRank, TuneRouters
from moe_lens.tuning.objective import answer_loss
from moe_lens.tuning.state import training

MID = {"hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 6, "vocab_size": 8192}
SMALL = MID | {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2}
BIG = MID | {"hidden_size": 1024, "intermediate_size": 512}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8, "eos_token_id": 1}
SIZES = {"small": SMALL | HEADS, "mid": MID | HEADS, "big": BIG | HEADS, "olmoe": {}}
TOP_K, RANK = 8, 8
#: How glibc's allocator is told to behave: to keep what is freed, so that no step waits for the system; or to give it
#: back at once, so that the process is as large as what is alive.
MALLOC = {
    "time": {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**32)},
    "memory": {"MALLOC_MMAP_THRESHOLD_": str(2**18), "MALLOC_TRIM_THRESHOLD_": str(2**18)},
}


@dataclass(frozen=True)
class Case:
    """A method on a model with `n_experts` per layer, of which `chosen` are trained where the method chooses some."""

    method: str
    n_experts: int = 64
    chosen: int = TOP_K


BASELINES = {"fft": Case("fft"), "stock": Case("fft, stock")}  # ours, and transformers' own way through the experts
METHODS = ("fft", "fft, stock", "ceft", "router", "ceft-lora", "router-lora", "peft lora")
CASES = [Case(method) for method in METHODS]
CASES += [Case("ceft", chosen=4), Case("ceft", chosen=16), Case("ceft", chosen=32), Case("ceft", n_experts=128)]


@dataclass(frozen=True)
class Setting:
    """What all cases share. dtype: of the weights that are not trained; those that are have float32."""

    size: str
    device: str
    dtype: torch.dtype
    threads: int
    steps: int
    batch_size: int = 4
    tokens: int = 256


def main(
    out: Annotated[Path, Option(help="Folder for training_cost.parquet.")],
    size: Annotated[str, Option(help=f"Of the model: {', '.join(SIZES)}.")] = "mid",
    device: Annotated[str, Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, Option(help="float32 or bfloat16.")] = "float32",
    threads: Annotated[int, Option(help="Of the CPU.")] = 1,
    rounds: Annotated[int, Option(help="Turns, each with processes of its own per case.")] = 3,
    steps: Annotated[int, Option(help="Steps per process.")] = 6,
    cases: Annotated[int | None, Option(help="Only the first so many cases.")] = None,
) -> None:
    """Measure the cases in turns and print them beside full fine-tuning, by moe_lens and by transformers alone."""
    if size not in SIZES:
        raise MoELensError(f"--size must be one of {', '.join(SIZES)}; got {size!r}")
    setting = Setting(size, device, console.dtype_named(dtype), threads, steps)
    rows = []
    for number in range(rounds):
        for case in CASES[:cases]:
            rows.append(asdict(case) | {"round": number} | _in_own_processes(case, setting))
            print(rows[-1], flush=True)
    told = asdict(setting) | {"dtype": dtype, "top_k": TOP_K, "rank": RANK, "peft": peft.__version__}
    write_table(pd.DataFrame(rows), out / "training_cost.parquet", provenance(model=size, seed=0, facts=told))
    console.show(summary(pd.DataFrame(rows)), title=f"A training step, {told}")


def _in_own_processes(case: Case, setting: Setting) -> dict[str, float]:
    """What a process for time and one for memory measure."""
    found = {}
    for what, behaviour in MALLOC.items():
        os.environ.update(behaviour)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            measured = process.submit(measure, case, setting).result()
        found |= {name: value for name, value in measured.items() if ("seconds" in name) == (what == "time")}
    return found


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Per case the least time and the median memory over rounds, also as shares of those of full fine-tuning."""
    cases = rows.groupby(["method", "n_experts", "chosen"], sort=False)
    times, memory = cases[["seconds", "cpu_seconds"]].min(), cases[["peak", "beside_weights"]].median()
    table = (cases[["trained"]].first() / 1e6).rename(columns={"trained": "trained_millions"})
    table = table.join(times).join((memory / 1e9).rename(columns="{}_gb".format))
    for name, case in BASELINES.items():
        baseline = table.reindex([astuple(case)]).iloc[0]  # all missing where the case was not measured
        for column in ("seconds", "peak_gb"):
            table[f"{column} / {name}"] = table[column] / baseline[column]
    return table.reset_index()


def measure(case: Case, setting: Setting) -> dict[str, float]:
    """In a fresh process: seconds of the fastest step, the peak of memory (bytes), and the trained parameters."""
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    before = _peak(setting.device)
    settings = OLMOE.settings | SIZES[setting.size] | {"num_experts": case.n_experts, "num_experts_per_tok": TOP_K}
    with torch.device(setting.device):
        module = AutoModelForCausalLM.from_config(CONFIG_MAPPING[OLMOE.model_type](**settings), dtype=setting.dtype)
    lens = MoELens.from_pretrained(module, load_tokenizer("organism"))
    weights = sum(parameter.nbytes for parameter in module.parameters())
    batch = _batch(module.config.vocab_size, setting)
    clock, work = [], []
    with _attached(case, lens) as (called, trained):
        count = sum(parameter.numel() for parameter in trained.values())
        with training(called, trained) as autocast:
            optimizer = torch.optim.AdamW(trained.values(), lr=5e-4, weight_decay=0.0, fused=True)
            for _ in range(setting.steps):
                started, worked = time.perf_counter(), time.process_time()
                optimizer.zero_grad()
                with autocast:
                    loss = answer_loss(called, batch)
                loss.backward()
                nn.utils.clip_grad_norm_(trained.values(), 1.0)
                optimizer.step()
                if setting.device == "cuda":
                    torch.cuda.synchronize()
                clock.append(time.perf_counter() - started)
                work.append(time.process_time() - worked)
            peak = _peak(setting.device) - before
    times = {"seconds": min(clock), "cpu_seconds": min(work)}
    return times | {"peak": peak, "beside_weights": peak - weights, "trained": count}


@contextmanager
def _attached(case: Case, lens: MoELens) -> Iterator[tuple[nn.Module, dict[str, nn.Parameter]]]:
    """What to call, and the parameters to train in it."""
    module, layers = lens.module, lens.architecture.moe_layers
    some = ExpertSet.of({layer: range(case.chosen) for layer in layers})
    experts = TuneExperts(ExpertSet.random_like(some, 0, n_experts=case.n_experts))
    if case.method == "fft, stock":
        yield module, dict(module.named_parameters())
    elif case.method == "peft lora":
        fused = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        wrapped = peft.get_peft_model(module, peft.LoraConfig(r=RANK, target_modules=[], target_parameters=fused))
        yield wrapped, {name: value for name, value in wrapped.named_parameters() if value.requires_grad}
    else:
        routers = TuneRouters()
        low_rank = {"ceft-lora": TuneLowRank(experts, RANK), "router-lora": TuneLowRank(routers, RANK)}
        method = {"fft": TuneAll(), "ceft": experts, "router": routers, **low_rank}[case.method]
        with method.attached(lens) as trainable:
            yield module, {name: module.get_parameter(name) for name in trainable.names}


def _batch(vocabulary: int, setting: Setting) -> Batch:
    """Random tokens, of which the last quarter is the answer."""
    ids = torch.randint(0, vocabulary, (setting.batch_size, setting.tokens)).tolist()
    prompts = [Encoded(str(i), "", tuple(row), None, None, (), setting.tokens * 3 // 4) for i, row in enumerate(ids)]
    return collate(prompts, 0)


def _peak(device: str) -> int:
    """The most memory held so far, bytes: of the GPU by torch, else of the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    console.run(main)
