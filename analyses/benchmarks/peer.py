"""One tool's ways to capture what a model computes, in a process of its own that runs one when a line names it.

    PYTHON analyses/benchmarks/peer.py TOOL FOLDER        # as performance.py starts it

TOOL: one of TOOLS, which PYTHON can import. FOLDER: a saved model with its tokenizer, texts.json, and inputs.pt, which
holds the same texts as tokens. For each line of stdin, ROWS NAME, the way of that name runs on so many rows, and a line
of JSON tells the seconds of CPU time, by how many bytes the peak of memory rose, and the sum of what was captured, its
signs left out, by which ways are seen to agree. No tool but moe_lens imports it.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Mapping[str, Tensor]
Way = Callable[[int], Iterable[Tensor]]
"""Of so many rows, what was captured, by layer."""


def of_transformers(folder: Path, inputs: Inputs) -> dict[str, Way]:
    """What its outputs can hold, and what hooks by hand give."""
    model = opened(folder)
    gates = [layer.mlp.gate for layer in model.model.layers]

    def run(rows: int, **asked: bool) -> Any:
        with torch.no_grad():
            return model(**first(inputs, rows), use_cache=False, logits_to_keep=1, **asked)

    def hooked(rows: int, modules: Iterable[nn.Module], part: Callable[[Any], Tensor]) -> list[Tensor]:
        found: list[Tensor] = []
        hooks = [module.register_forward_hook(lambda _, __, out: found.append(part(out))) for module in modules]
        run(rows)
        for hook in hooks:
            hook.remove()
        return found

    def maps(rows: int) -> Iterable[Tensor]:
        with attending(model, "eager"):
            return run(rows, output_attentions=True).attentions

    return {
        "plain": lambda rows: [run(rows).logits],
        "routing, by output_router_logits": lambda rows: run(rows, output_router_logits=True).router_logits,
        "routing, by hooks": lambda rows: hooked(rows, gates, lambda out: out[0]),
        "residual, by output_hidden_states": lambda rows: run(rows, output_hidden_states=True).hidden_states[1:-1],
        "residual, by hooks": lambda rows: hooked(rows, model.model.layers[:-1], lambda out: out),
        "attention maps, by output_attentions": maps,
    }


def of_moe_lens(folder: Path, inputs: Inputs) -> dict[str, Way]:
    """What `lens.records` captures."""
    from moe_lens import MoELens

    lens = MoELens.from_pretrained(folder)
    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))

    def recorded(rows: int, capture: str, positions: str) -> Any:
        asked = {"capture": (capture,), "positions": positions, "batch_size": rows, "progress": False}
        [record] = lens.records(texts[:rows], **asked)
        return record

    def routing(rows: int) -> list[Tensor]:
        return [of.logits for of in recorded(rows, "routing", "last").routing.values()]

    def captured(name: str, positions: str) -> Way:
        return lambda rows: list(recorded(rows, name, positions).captured[name].values())

    return {
        "routing": routing,
        "residual": lambda rows: captured("residual", "all")(rows)[:-1],
        "attention maps": captured("attention", "all"),
        "attention of the last token": captured("attention", "last"),
        "expert outputs": captured("expert_outputs", "all"),
        "expert outputs at the last token": captured("expert_outputs", "last"),
    }


def of_nnterp(folder: Path, inputs: Inputs) -> dict[str, Way]:
    """Its accessors in one trace; attention maps need a model that was opened for them."""
    import nnsight
    from nnterp import StandardizedTransformer

    asked = {"use_cache": False, "logits_to_keep": 1}
    models: dict[bool, StandardizedTransformer] = {}

    def model(maps: bool = False) -> StandardizedTransformer:
        if maps not in models:
            models[maps] = StandardizedTransformer(str(folder), enable_attention_probs=maps, dispatch=True)
        return models[maps]

    @torch.no_grad()
    def routing(rows: int) -> list[Tensor]:
        own = model()
        with own.trace(dict(first(inputs, rows)), **asked):
            found = nnsight.save([own.mlps[layer].gate.output[0] for layer in range(own.num_layers)])
        return found  # noqa: RET504 (a trace returns nothing)

    @torch.no_grad()
    def residual(rows: int) -> list[Tensor]:
        own = model()
        with own.trace(dict(first(inputs, rows)), **asked):
            found = nnsight.save([own.layers_output[layer] for layer in range(own.num_layers - 1)])
        return found  # noqa: RET504

    @torch.no_grad()
    def maps(rows: int) -> list[Tensor]:
        own = model(maps=True)
        with own.trace(dict(first(inputs, rows)), **asked):
            found = nnsight.save([own.attention_probabilities[layer] for layer in range(own.num_layers)])
        return found  # noqa: RET504

    return {"routing": routing, "residual": residual, "attention maps": maps}


def of_transformer_lens(folder: Path, inputs: Inputs) -> dict[str, Way]:
    """Its cache of the hooks of these names; it attends eagerly, whatever is asked."""
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(str(folder), device="cpu")
    layers = range(model.cfg.n_layers)

    def cached(hook: str, layers: range = layers) -> Way:
        names = [f"blocks.{layer}.{hook}" for layer in layers]

        def run(rows: int) -> list[Tensor]:
            with torch.no_grad():
                _, cache = model.run_with_cache(first(inputs, rows)["input_ids"], names_filter=names)
            return [cache[name] for name in names]

        return run

    return {
        "nothing": cached("hook_out", layers[:0]),
        "routing": cached("mlp.gate.hook_out"),
        "residual": cached("hook_out", layers[:-1]),
        "attention maps": cached("attn.hook_pattern"),
    }


TOOLS = {
    "transformers": of_transformers,
    "moe_lens": of_moe_lens,
    "nnterp": of_nnterp,
    "transformer_lens": of_transformer_lens,
}


def opened(folder: Path) -> Any:
    """The model, as transformers opens it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def first(inputs: Inputs, rows: int) -> Inputs:
    """The first rows of a batch."""
    return {name: values[:rows] for name, values in inputs.items()}


@contextmanager
def attending(model: Any, implementation: str) -> Iterator[None]:
    """Inside the block the model attends by that implementation."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def measured(way: Way, rows: int) -> dict[str, float]:
    """Seconds of CPU time, bytes by which the peak rose above what is held before, and the sum of what was captured."""
    Path("/proc/self/clear_refs").write_text("5")  # from here on Linux counts the peak anew
    held, started = resident("VmRSS"), time.process_time()
    found = list(way(rows))
    seconds, added = time.process_time() - started, resident("VmHWM") - held
    return {"cpu_seconds": seconds, "added": added, "sum": sum(float(one.double().abs().sum()) for one in found)}


def resident(name: str) -> int:
    """Bytes of memory that this process holds (VmRSS), or held at most (VmHWM)."""
    [kib] = re.findall(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(kib) * 1024


def main(tool: str, folder: Path) -> None:
    """Tell the names of the ways, then run them as they are asked for."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a tool prints is no answer
    ways = TOOLS[tool](folder, torch.load(folder / "inputs.pt"))
    print(json.dumps(list(ways)), file=answers, flush=True)
    for line in sys.stdin:
        rows, _, name = line.strip().partition(" ")
        print(json.dumps(measured(ways[name], int(rows))), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
