"""Run by torchrun on two processes: training with a copy of the model in each (DDP), and split over them (FSDP2).

Each way is run through, and run again with an interruption after which a new model goes on from the checkpoints. The
values of every course are left in the folder given, for the test to compare with those of one process. Last, a split
model fails.
"""

import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from training_cases import EXAMPLES, UNEVEN, fresh, prompts
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moe_lens import ExpertSet, MoELens, MoELensError
from moe_lens.tuning import Checkpoints, DevScore, TuneExperts, TuneLowRank, TuneRouters, fit, save_trained, tune
from moe_lens.tuning.processes import Processes, empty


def held(tokenizer: PreTrainedTokenizerBase, *, shard: bool) -> MoELens:
    """The model, of which the second process has shapes only where it is to be split."""
    lens = fresh(tokenizer, num_hidden_layers=2)
    if shard and not Processes.current().is_main:
        empty(lens.module)
    return lens


def course(out: Path, *, shard: bool, interrupted_after: int | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(out.parent)
    measured = []  # over the interruption: the score rises from each measurement to the next
    for stop in [None] if interrupted_after is None else [interrupted_after, None]:
        lens = held(tokenizer, shard=shard)
        names = [name for name, _ in lens.module.named_parameters()]

        def measure(stop=stop) -> float:
            if len(measured) + 1 == stop:
                raise KeyboardInterrupt
            measured.append(1)
            return float(len(measured))

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
    assert PartialState().num_processes == 2
    if PartialState().is_main_process:
        values = {name: parameter.detach() for name, parameter in lens.module.named_parameters()}
        values["losses"] = torch.tensor([row["loss"] for row in progress.rows], dtype=torch.float64)
        save_file(values, out / "values.safetensors")
    PartialState().wait_for_everyone()


def tuned_experts(out: Path, *, shard: bool) -> None:
    """Chosen experts, from the examples to the delta."""
    lens = held(AutoTokenizer.from_pretrained(out.parent), shard=shard)
    method = TuneExperts(ExpertSet.of({0: [1, 2, 5], 1: [4]}))
    tuned = tune(lens, EXAMPLES, EXAMPLES[:5], method, UNEVEN, out=out, score="em", max_new_tokens=2, shard=shard)
    if PartialState().is_main_process:
        save_trained(lens.module, tuned.trained, out, facts={"scores": tuned.candidates["dev_em"].tolist()})
    PartialState().wait_for_everyone()


def peaked(out: Path, *, shard: bool) -> None:
    """All is trained and measured twice, the first time better: that is the state that is left."""
    lens = held(AutoTokenizer.from_pretrained(out.parent), shard=shard)
    scores = iter([1.0, 0.0])

    def measure() -> float:
        lens.module(torch.tensor([[3, 4, 5]]))  # after which FSDP2 leaves the outermost parameters together
        return next(scores)

    names = [name for name, _ in lens.module.named_parameters()]
    dev, layers = DevScore("dev_none", measure), lens.architecture.layers if shard else ()
    progress = fit(lens.module, names, prompts(lens), UNEVEN, pad_id=0, dev=dev, shard=layers)
    assert progress.best_step < progress.step
    if PartialState().is_main_process:
        save_file({name: value.detach() for name, value in lens.module.named_parameters()}, out / "peaked.safetensors")
    PartialState().wait_for_everyone()


def failed(out: Path) -> None:
    """A split model that leaves the numbers ends with the message that says so, and holds no memory."""
    for method in (TuneExperts(ExpertSet.of({0: [1, 2, 5], 1: [4]})), TuneLowRank(TuneRouters())):
        lens = fresh(AutoTokenizer.from_pretrained(out), num_hidden_layers=2)
        with torch.no_grad():
            lens.module.model.norm.weight[0] = torch.nan
        with pytest.raises(MoELensError, match="the loss became nan at step 1 of 6"):
            tune(lens, EXAMPLES, EXAMPLES[:5], method, UNEVEN, max_new_tokens=2, shard=True)
        assert {tensor.device.type for tensor in lens.module.parameters()} == {"meta"}


def unlike(out: Path) -> None:
    """A model that is not the first process's is refused in both, neither of which waits for the other."""
    lens = fresh(AutoTokenizer.from_pretrained(out), num_hidden_layers=2 + Processes.current().rank)
    with pytest.raises(MoELensError, match=r"be whole .* of the same shapes in all; .*\(there None, here"):
        tune(lens, EXAMPLES, EXAMPLES[:5], TuneRouters(), UNEVEN, max_new_tokens=2, shard=True)


if __name__ == "__main__":
    for name, shard in (("ddp", False), ("fsdp", True)):
        course(Path(sys.argv[1]) / name, shard=shard, interrupted_after=None)
        course(Path(sys.argv[1]) / f"{name}-resumed", shard=shard, interrupted_after=2)
        tuned_experts(Path(sys.argv[1]) / f"{name}-experts", shard=shard)
        peaked(Path(sys.argv[1]) / name, shard=shard)
    failed(Path(sys.argv[1]))
    unlike(Path(sys.argv[1]))
    PartialState().destroy_process_group()
