"""Run by torchrun, or alone: command lines of moe_lens, each as `python -m` would run it, one after another."""

import runpy
import shlex
import sys

import torch
import torch.distributed as dist


def run(line: str) -> None:
    command, *arguments = shlex.split(line)
    sys.argv = [command, *arguments]
    try:
        runpy.run_module(f"moe_lens.{command}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.argv[1:]:
        run(line)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
