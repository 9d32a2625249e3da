"""Run by torchrun on two processes: training with a copy of the model in each (DDP), and split over them (FSDP2).

Each way is run through, and run again with an interruption after which a new model goes on from the checkpoints. The
values of every course are left in the folder given, for the test to compare with those of one process.
"""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from training_cases import UNEVEN, fresh, prompts
from transformers import AutoTokenizer

from moe_lens.tuning import Checkpoints, DevScore, fit
from moe_lens.tuning.processes import whole


def course(out: Path, *, shard: bool, interrupted_after: int | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(out.parent)
    for stop in [None] if interrupted_after is None else [interrupted_after, None]:
        lens = fresh(tokenizer, num_hidden_layers=2)
        names = [name for name, _ in lens.module.named_parameters()]
        seen = []

        def measure(stop=stop, seen=seen) -> float:
            seen.append(1)
            if len(seen) == stop:
                raise KeyboardInterrupt
            return float(len(seen))

        try:
            progress = fit(
                lens.module,
                names,
                prompts(lens),
                UNEVEN,
                pad_id=0,
                dev=DevScore("dev_none", measure),
                checkpoints=Checkpoints(out, {"course": out.name}, every=0),
                shard=lens.architecture.layers if shard else (),
            )
        except KeyboardInterrupt:
            continue
    values = {name: whole(parameter) for name, parameter in lens.module.named_parameters()}
    values["losses"] = torch.tensor([row["loss"] for row in progress.rows], dtype=torch.float64)
    if PartialState().is_main_process:
        save_file(values, out / "values.safetensors")
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    for name, shard in (("ddp", False), ("fsdp", True)):
        course(Path(sys.argv[1]) / name, shard=shard, interrupted_after=None)
        course(Path(sys.argv[1]) / f"{name}-resumed", shard=shard, interrupted_after=2)
    PartialState().destroy_process_group()
