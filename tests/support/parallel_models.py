"""Run alone, or by torchrun on two processes that hold one model together: what a lens says of it is left in a file."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_lens import ExpertSet, ExpertUsage, MoELens, MoELensError
from moe_lens.causal import evaluate
from moe_lens.data import Example
from moe_lens.lens import AddVector, Bias, Force, Reroute, Scale, TopK, Zero
from moe_lens.lens.delta import weights_digest
from moe_lens.lens.parallel import sharing

PLANS = {"tensor": {"tp_size": 2}, "expert": {"tp_size": 2, "ep_size": 2}}
CAPTURES = ("routing", "router_input", "expert_outputs", "moe_output", "residual", "logits")
EXAMPLES = [
    Example(str(n), f"The cat {n} sat.", "Where is the dog?" * (1 + n % 2), ("mat", "sun")[n % 2 :]) for n in range(4)
]


def opened(folder: Path, kind: str) -> MoELens:
    plan = {}
    if kind in PLANS:
        from transformers.distributed import DistributedConfig

        plan = {"distributed_config": DistributedConfig(**PLANS[kind])}
    module = AutoModelForCausalLM.from_pretrained(folder, **plan).eval()
    return MoELens(module, AutoTokenizer.from_pretrained(folder), progress=False)


def shown(lens: MoELens, capture: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """What one record holds, by name and layer."""
    [record] = lens.records(EXAMPLES, capture=capture, positions="question")
    found = {"logits": record.logits} if record.logits is not None else {}
    for name, layers in record.captured.items():
        for layer, value in layers.items():
            if name == "routing":
                order = value.indices.argsort(-1)
                found[f"{name}.{layer}.experts"] = value.indices.gather(-1, order)
                found[f"{name}.{layer}.weights"] = value.weights.gather(-1, order)
                found[f"{name}.{layer}.logits"] = value.logits
            else:
                found[f"{name}.{layer}"] = value
    return found


def everything(lens: MoELens) -> dict[str, object]:
    first, *_ = lens.architecture.moe_layers
    experts = ExpertSet.of({layer: [0, 2, 3] for layer in lens.architecture.moe_layers})
    changes = {
        "zero": Zero(experts),
        "reroute": Reroute(experts),
        "scale": Scale(experts, 2.0),
        "bias": Bias(experts, 3.0),
        "force": Force(ExpertSet.of({first: [1]})),
        "topk": TopK(2),
        "vector": AddVector(first, torch.ones(lens.architecture.d_model)),
    }
    found: dict[str, object] = {"plain": shown(lens, CAPTURES), "digest": weights_digest(lens.module)}
    for name, change in changes.items():
        with lens.intervene(change):
            found[name] = shown(lens, ("routing", "logits"))
            found[f"{name} answers"] = lens.generate(EXAMPLES, max_new_tokens=4)
    [usage] = lens.measure(EXAMPLES, ExpertUsage())
    found["usage"] = {"score": torch.tensor(usage.table()["score"].to_numpy())}
    found["answers"] = lens.generate(EXAMPLES, max_new_tokens=4)
    found["probabilities"] = {"of answers": torch.tensor(lens.answer_log_probabilities(EXAMPLES))}
    return found


def refused(lens: MoELens) -> list[str]:
    """What processes that hold one model together cannot do: take examples of their own."""
    said = []
    for work in (lambda: evaluate(lens, EXAMPLES, max_new_tokens=1), lambda: lens.measure(EXAMPLES, ExpertUsage())):
        try:
            with sharing():
                work()
        except MoELensError as error:
            said.append(str(error))
    return said


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    own = opened(folder, kind)
    told = everything(own)
    if kind in PLANS:
        told["refused"] = refused(own)
    if os.environ.get("RANK", "0") == "0":
        torch.save(told, out)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
