"""What the paper's tables need on one card, estimated: memory from parameters, hours from parameters times tokens.

    python analyses/benchmarks/paper_budget.py

Nothing is run and no weight is read: models are built on the meta device. What is assumed stands in ASSUMED.
"""

from collections.abc import Iterator
from types import MappingProxyType

import pandas as pd

from moe_lens.architecture import MoEArchitecture
from moe_lens.architecture.discovery import text_config
from moe_lens.architecture.paper_models import PAPER_MODELS
from moe_lens.architecture.sizes import parameter_counts
from moe_lens.commands import console
from moe_lens.paper.markdown import markdown

TRAIN = MappingProxyType({"squad": 82_258, "nq": 98_867, "hotpotqa": 69_281, "nq-swap": 3_000, "confiqa-mc": 4_000})
TEST = MappingProxyType({"squad": 10_507, "nq": 12_836, "hotpotqa": 5_904, "nq-swap": 1_000, "confiqa-mc": 1_500})
EPOCHS = MappingProxyType({"nq-swap": 3, "confiqa-mc": 3})
CARDS = MappingProxyType({"A100": 312e12, "H100": 989e12})
ASSUMED = MappingProxyType({"tokens of an example": 250, "tokens of a step": 8 * 300, "share of the card's peak": 0.15})
"""Mean and longest prompts of the paper's training, and how much of bfloat16's peak (dense, in CARDS) is reached."""
PASSES = MappingProxyType({"router": 4, "CEFT": 4.4, "FFT": 6})
"""Operations per activated parameter and token: forward 2, gradients of activations 2, of all weights 2."""
BYTES = 16
"""Of a parameter that learns: its value, gradient and two moments in float32; in bfloat16 all others take 2."""


def rows() -> Iterator[dict[str, object]]:
    """For each model and method: trained parameters, memory, and hours of one training and its test answers."""
    for model in PAPER_MODELS:
        skeleton = model.skeleton()
        counts, architecture = parameter_counts(skeleton), MoEArchitecture.of(skeleton)
        config = text_config(skeleton)
        inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        layers, width = len(architecture.moe), architecture.d_model
        experts = layers * architecture.top_k * 3 * inner * width
        trained = {"router": layers * architecture.n_experts * width, "CEFT": experts, "FFT": counts.total}
        kept = ASSUMED["tokens of a step"] * architecture.n_layers * (16 * width + 6 * architecture.top_k * inner) * 2
        for method, learn in trained.items():
            held = (counts.total - (learn if method == "FFT" else 0)) * 2
            row = {"model": model.name, "method": method, "trained (10^9)": learn / 1e9}
            row["memory (GB)"] = round((held + learn * BYTES + kept) / 1e9)
            yield row | hours(counts.activated, method)


def hours(activated: int, method: str) -> dict[str, float]:
    """Of one training on NQ-Swap, and of one on each of the five data sets with their test answers, by card."""
    found = {}
    for card, peak in CARDS.items():
        speed = peak * ASSUMED["share of the card's peak"] * 3600
        of = {
            name: ASSUMED["tokens of an example"] * activated
            * (TRAIN[name] * EPOCHS.get(name, 1) * PASSES[method] + TEST[name] * 2 * 2) / speed
            for name in TRAIN
        }  # fmt: skip  # answers take about as long as their prompts
        found |= {f"NQ-Swap, {card} (h)": of["nq-swap"], f"all five, {card} (h)": sum(of.values())}
    return found


def main() -> None:
    """Print the table of docs/paper.md."""
    table = pd.DataFrame(rows())
    console.say(markdown([list(table), *table.itertuples(index=False)]))


if __name__ == "__main__":
    console.run(main)
