"""Run alone, or by torchrun on two processes that hold models together: what a lens says of each is left in a file."""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist

from moe_lens import ExpertSet, ExpertUsage, MoELens
from moe_lens.causal import Attribution, attribution, evaluate, single_expert_effects
from moe_lens.commands.asked_measures import Variant
from moe_lens.commands.statistic_passes import Measuring
from moe_lens.data import Example
from moe_lens.lens import AddVector, Bias, Force, Reroute, Scale, TopK, Zero
from moe_lens.lens.delta import weights_digest
from moe_lens.lens.parallel import sharing
from moe_lens.results import read_table

PLANS = {"tensor": {"tp_size": 2}, "expert": {"tp_size": 2, "ep_size": 2}}
CAPTURES = ("routing", "router_input", "expert_outputs", "moe_output", "residual", "logits")
EXAMPLES = [
    Example(str(n), f"The cat {n} sat.", "Where is the dog?" * (1 + n % 2), ("mat", "sun")[n % 2 :]) for n in range(4)
]


def opened(folder: Path, kind: str) -> MoELens:
    plan = None
    if kind in PLANS:
        from transformers.distributed import DistributedConfig

        plan = DistributedConfig(**PLANS[kind])
    lens = MoELens.from_pretrained(folder, distributed_config=plan)
    lens.progress = False
    return lens


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
    found["answers"] = lens.generate(EXAMPLES, max_new_tokens=4)
    found["probabilities"] = {"of answers": torch.tensor(lens.answer_log_probabilities(EXAMPLES))}
    return found


def tables_of_weights(lens: MoELens, out: Path) -> dict[str, pd.Series]:
    """What the command that measures makes of the model's own weights."""
    with sharing():
        Measuring(("weights", "vocabulary"), "question", out, {}).run(
            Variant("model", lambda: nullcontext(lens)), {"data": EXAMPLES}
        )
    if dist.is_initialized():
        dist.barrier()
    [alike], [written] = (list(out.glob(f"parts/*{name}.parquet")) for name in ("weights", "vocabulary-table"))
    return {"alike": read_table(alike)["similarity"], "written": read_table(written)["excess"]}


def shared(lens: MoELens, out: Path) -> dict[str, object]:
    """What takes a model's examples over processes where each has the whole: here all run alike, and one writes."""
    first, *_ = lens.architecture.moe_layers
    mask = {"zero": Zero(ExpertSet.of({first: [0, 1]}))}
    with sharing():
        [usage] = lens.measure(EXAMPLES, ExpertUsage())
        gates, outputs = attribution(
            lens, EXAMPLES, *(Attribution(effect=own, target="answer") for own in ("gate", "output"))
        )
        found = evaluate(lens, EXAMPLES, mask, metrics=["em", "answer_log_probability"], max_new_tokens=4, out=out)
        again = evaluate(lens, EXAMPLES, mask, metrics=["em", "answer_log_probability"], max_new_tokens=4, out=out)
        effects = single_expert_effects(lens, EXAMPLES, only=[(first, 0), (first, 1)])
    assert again.answers.equals(found.answers), "what is kept is read again"
    numbers = {
        "usage": usage.table()["score"],
        "gates": gates["score"],
        "outputs": outputs["score"],
        "probabilities": found.answers["answer_log_probability"],
        "effects": effects["effect"],
        **tables_of_weights(lens, out),
    }
    told = {name: torch.tensor(values.to_numpy()) for name, values in numbers.items()}
    parts = sorted(path.name.rpartition("-")[0].partition("-")[0] for path in out.glob("parts/*"))
    return {"shared": told, "predictions": found.answers["prediction"].tolist(), "parts": parts}


if __name__ == "__main__":
    torch.set_num_threads(1)
    *folders, out = map(Path, sys.argv[1:])
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    told = {}
    for folder in folders:
        for kind in ("one",) if alone else PLANS:
            own = opened(folder, kind)
            told[folder.name, kind] = everything(own) | shared(own, out.parent / f"{folder.name}-{kind}")
    if os.environ.get("RANK", "0") == "0":
        torch.save(told, out)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
