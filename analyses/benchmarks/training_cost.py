"""What a training step costs by each method, in time and memory, beside full fine-tuning and PEFT's LoRA.

    python analyses/benchmarks/training_cost.py --out RUN/training_cost
    python analyses/benchmarks/training_cost.py --size big --methods fft,ceft,router --baselines fft --out RUN/big
    python analyses/benchmarks/training_cost.py --size olmoe --device cuda --baselines "" --out RUN/olmoe

Time: each case and the baselines, full fine-tuning by moe_lens (fft) and as transformers itself runs it (stock), take
steps in turn, each in a process of its own. A case's share is the median, over its turns, of its step's time by that of
the baseline's step in the same turn (in brackets the quartiles), so that what else the machine does falls on both
alike. Memory: the peak of a process that is alone. Weights, tokens and chosen experts are random: k of E experts are
sent k/E of the tokens. A baseline stays in memory beside every case: 3 GB for mid, 11 GB for big, 115 GB for olmoe.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, astuple, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import pandas as pd
import peft
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from turns import peak_bytes, quartiles, synchronize
from typer import Option

from moe_lens import ExpertSet, MoELens, MoELensError
from moe_lens.architecture.paper_models import OLMOE
from moe_lens.commands import console
from moe_lens.data import Batch, Encoded, collate
from moe_lens.lens.loading import load_tokenizer
from moe_lens.results import provenance, write_table
from moe_lens.storage import try_folder
from moe_lens.tuning import TuneAll, TuneExperts, TuneLowRank, TuneRouters
from moe_lens.tuning.objective import answer_loss
from moe_lens.tuning.state import training

MID = {"hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 6, "vocab_size": 8192}
SMALL = MID | {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2}
BIG = MID | {"hidden_size": 1024, "intermediate_size": 512}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8, "eos_token_id": 1}
SIZES = {"small": SMALL | HEADS, "mid": MID | HEADS, "big": BIG | HEADS, "olmoe": {}}
TOP_K, RANK, WARM_UP = 8, 8, 2
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


BASELINES = ("fft", "stock")
METHODS = (*BASELINES, "ceft", "router", "ceft-lora", "router-lora", "peft-lora")
CASES = [*map(Case, METHODS), *(Case("ceft", chosen=k) for k in (4, 16, 32)), Case("ceft", n_experts=128)]


@dataclass(frozen=True)
class Setting:
    """What all cases share. dtype: of the weights that are not trained; those that are have float32."""

    size: str
    device: str
    dtype: torch.dtype
    threads: int
    batch_size: int = 4
    tokens: int = 256


def main(
    out: Annotated[Path, Option(help="Folder for training_cost.parquet and summary.parquet.")],
    size: Annotated[str, Option(help=f"Of the model: {', '.join(SIZES)}.")] = "mid",
    device: Annotated[str, Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, Option(help="float32 or bfloat16.")] = "float32",
    threads: Annotated[int, Option(help="Of the CPU, per process.")] = 1,
    turns: Annotated[int, Option(min=1, help=f"Timed steps per case, after {WARM_UP} that are not.")] = 10,
    methods: Annotated[str, Option(help="Those to measure; ceft with more or fewer experts too.")] = ",".join(METHODS),
    baselines: Annotated[str, Option(help="Those that each case steps beside; '' for none.")] = ",".join(BASELINES),
) -> None:
    """Measure methods in turns with full fine-tuning and print them beside it."""
    try_folder(out)
    if size not in SIZES:
        raise MoELensError(f"--size must be one of {', '.join(SIZES)}; got {size!r}")
    setting = Setting(size, device, console.dtype_named(dtype), threads)
    measured = known(methods, METHODS, "--methods")
    compared = known(baselines, BASELINES, "--baselines") if baselines else []
    told = asdict(setting) | {"dtype": dtype, "turns": turns, "warm_up": WARM_UP, "top_k": TOP_K, "rank": RANK}
    made_by = provenance(model=size, seed=0, facts=told | {"peft": peft.__version__})
    rows = []
    for case in tqdm([case for case in CASES if case.method in measured], unit="case"):
        memory = memory_of(case, setting)
        rows += [asdict(case) | memory | seconds for seconds in turns_of(case, compared, setting, turns)]
        write_table(pd.DataFrame(rows), out / "training_cost.parquet", made_by)
    table = summary(pd.DataFrame(rows))
    write_table(table, out / "summary.parquet", made_by)
    console.show(table, title=f"A training step, {told}")


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Per case its fastest step, its memory, and shares of full fine-tuning: of time, median (quartiles) of turns."""
    compared = [name for name in BASELINES if f"{name} seconds" in rows]
    shares = {f"seconds / {name}": rows["seconds"] / rows[f"{name} seconds"] for name in compared}
    cases = rows.assign(**shares).groupby(["method", "n_experts", "chosen"], sort=False)
    table = (cases[["trained"]].first() / 1e6).rename(columns={"trained": "trained_millions"})
    table = table.join(cases["seconds"].min()).join(cases[list(shares)].agg(quartiles))
    table = table.join((cases[["peak", "beside_weights"]].first() / 1e9).rename(columns="{}_gb".format))
    full = table["peak_gb"].reindex([astuple(Case("fft"))]).iloc[0]  # missing where it was not measured
    return table.assign(**{"peak / fft": table["peak_gb"] / full}).reset_index()


def known(names: str, choice: Sequence[str], option: str) -> list[str]:
    """The names in a list with commas; MoELensError for one that is not known."""
    given = names.split(",")
    if unknown := set(given).difference(choice):
        raise MoELensError(f"{option} takes {','.join(choice)}; got {','.join(sorted(unknown))}")
    return given


def memory_of(case: Case, setting: Setting) -> dict[str, int]:
    """What is trained (parameters), the peak of memory, and what of it is not weights (bytes)."""
    with _process(case, setting, "memory") as step:
        found = [step() for _ in range(WARM_UP + 1)][-1]
    return {name: found[name] for name in ("trained", "peak", "beside_weights")}


def turns_of(
    case: Case, baselines: Sequence[str], setting: Setting, turns: int, *, clock: str = "seconds"
) -> list[dict[str, float]]:
    """Per turn the seconds of the case's step and of each baseline's; every other turn is in reversed order.

    clock: "seconds" of the clock, or "cpu_seconds" of the CPU's work, which other processes do not blur.
    """
    named = {f"{name} seconds": Case(name) for name in baselines} | {"seconds": case}
    found = []
    with ExitStack() as stack:
        steps = {one: stack.enter_context(_process(one, setting, "time")) for one in dict.fromkeys(named.values())}
        for turn in range(-WARM_UP, turns):
            order = list(steps)[:: -1 if turn % 2 else 1]
            seconds = {one: steps[one]()[clock] for one in order}
            if turn >= 0:
                found.append({"turn": turn} | {name: seconds[one] for name, one in named.items()})
    return found


@contextmanager
def _process(case: Case, setting: Setting, purpose: str) -> Iterator[Callable[[], dict[str, float]]]:
    """What has a fresh process take a training step, and gives what `_serve` tells of it.

    purpose: "time" or "memory", which its allocator then serves. Raises MoELensError from a step in which it dies.
    """
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(case, setting, there), daemon=True)
    os.environ.update(MALLOC[purpose])  # which a spawned process inherits
    process.start()
    there.close()  # or else nobody would tell that the process has died

    def step() -> dict[str, float]:
        try:
            here.send("step")
            return here.recv()
        except (EOFError, OSError):
            process.join()
            raise MoELensError(
                f"the process of {case} ended with code {process.exitcode}; if memory ran out, take a smaller --size, "
                "fewer --baselines or fewer --methods"
            ) from None

    try:
        yield step
    finally:
        process.kill()
        process.join()
        here.close()


def _serve(case: Case, setting: Setting, pipe: Connection) -> None:
    """In a fresh process, until it is killed: take a step when asked, and tell its seconds and the memory so far.

    peak: bytes that the model and its training took at most. beside_weights: what of them is not the model's weights.
    trained: how many parameters are.
    """
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    before = peak_bytes(setting.device)
    settings = OLMOE.settings | SIZES[setting.size] | {"num_experts": case.n_experts, "num_experts_per_tok": TOP_K}
    with torch.device(setting.device):
        module = AutoModelForCausalLM.from_config(CONFIG_MAPPING[OLMOE.model_type](**settings), dtype=setting.dtype)
    lens = MoELens.from_pretrained(module, load_tokenizer("organism"))
    weights = sum(parameter.nbytes for parameter in module.parameters())
    with stepping(case, lens, random_batch(lens, setting.batch_size, setting.tokens)) as (step, count):
        while pipe.recv() == "step":
            started, worked = time.perf_counter(), time.process_time()
            step()
            synchronize(setting.device)
            found = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - worked}
            peak = peak_bytes(setting.device) - before
            pipe.send(found | {"peak": peak, "beside_weights": peak - weights, "trained": count})


@contextmanager
def stepping(case: Case, lens: MoELens, batch: Batch) -> Iterator[tuple[Callable[[], None], int]]:
    """Inside the block: what takes a training step on the batch, and how many parameters it trains."""
    with _attached(case, lens) as (called, trained), training(called, trained) as autocast:
        optimizer = torch.optim.AdamW(trained.values(), lr=5e-4, weight_decay=0.0, fused=True)

        def step() -> None:
            optimizer.zero_grad()
            with autocast:
                loss = answer_loss(called, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()

        yield step, sum(parameter.numel() for parameter in trained.values())


@contextmanager
def _attached(case: Case, lens: MoELens) -> Iterator[tuple[nn.Module, dict[str, nn.Parameter]]]:
    """What to call, and the parameters to train in it."""
    module, layers = lens.module, lens.architecture.moe_layers
    some = ExpertSet.of({layer: range(case.chosen) for layer in layers})
    experts = TuneExperts(ExpertSet.random_like(some, 0, n_experts=case.n_experts))
    if case.method == "stock":
        yield module, dict(module.named_parameters())
    elif case.method == "peft-lora":
        fused = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        wrapped = peft.get_peft_model(module, peft.LoraConfig(r=RANK, target_modules=[], target_parameters=fused))
        yield wrapped, {name: value for name, value in wrapped.named_parameters() if value.requires_grad}
    else:
        routers = TuneRouters()
        low_rank = {"ceft-lora": TuneLowRank(experts, RANK), "router-lora": TuneLowRank(routers, RANK)}
        method = {"fft": TuneAll(), "ceft": experts, "router": routers, **low_rank}[case.method]
        with method.attached(lens) as trainable:
            yield module, {name: module.get_parameter(name) for name in trainable.names}


def random_batch(lens: MoELens, batch_size: int, tokens: int) -> Batch:
    """Random tokens, of which the last quarter is the answer."""
    ids = torch.randint(0, lens.module.config.vocab_size, (batch_size, tokens)).tolist()
    prompts = [Encoded(str(i), "", tuple(row), None, None, (), tokens * 3 // 4) for i, row in enumerate(ids)]
    return collate(prompts, 0)


if __name__ == "__main__":
    console.run(main)
