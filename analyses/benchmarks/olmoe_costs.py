"""What the commands of docs/olmoe.md take, estimated: memory, and time on two cards and on one core of a CPU.

    python analyses/benchmarks/olmoe_costs.py

Nothing is run and no weight is read. Operations are counted as in paper_budget.py; a token that is generated costs its
operations, or reading all weights once for its batch, whichever takes longer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from types import MappingProxyType

import pandas as pd
import paper_budget

from moe_lens.architecture.paper_models import OLMOE
from moe_lens.architecture.sizes import parameter_counts
from moe_lens.commands import console
from moe_lens.paper.markdown import markdown

SHARE = paper_budget.ASSUMED["share of the card's peak"]
TOKENS = paper_budget.ASSUMED["tokens of an example"]
BATCH, NEW_TOKENS = 32, 16
OPERATIONS = MappingProxyType({card: peak * SHARE for card, peak in paper_budget.CARDS.items()} | {"a CPU core": 50e9})
"""Per second: of the cards as in docs/paper.md; of a core what docs/performance.md measures of its own plain passes."""
BANDWIDTH = MappingProxyType({"A100": 2.0e12 / 2, "H100": 3.35e12 / 2, "a CPU core": 10e9})
"""Bytes per second that are read, half of what the cards' makers say."""


@dataclass(frozen=True)
class Step:
    """Examples that pass, how often (a forward pass is 1, the operations of training are in proportion), and answers.

    answers: how often all of them are answered. memory: what is held, in GB.
    """

    name: str
    examples: int
    passes: float
    answers: int
    memory: float

    def hours(self, activated: int, total: int, machine: str) -> float:
        """On that machine, of a model with so many parameters that a token uses, and in all."""
        speed = OPERATIONS[machine]
        read = self.examples * TOKENS * (self.passes + self.answers) * 2 * activated / speed
        token = max(BATCH * 2 * activated / speed, total * 2 / BANDWIDTH[machine])
        return (read + ceil(self.examples / BATCH) * self.answers * NEW_TOKENS * token) / 3600


def steps() -> Iterator[Step]:
    """Those of the page, in its order."""
    budget = {row["method"]: row["memory (GB)"] for row in paper_budget.rows() if row["model"] == OLMOE.name}
    skeleton = OLMOE.skeleton()
    weights = parameter_counts(skeleton).total * 2 / 1e9
    config = skeleton.config
    # every selected expert's output, of a batch of 8, in bfloat16
    outputs = 8 * TOKENS * config.num_experts_per_tok * config.num_hidden_layers * config.hidden_size * 2 / 1e9
    train, dev = paper_budget.TRAIN["nq-swap"] * paper_budget.EPOCHS["nq-swap"], 746 * paper_budget.EPOCHS["nq-swap"]
    training = {name: passes / 2 for name, passes in paper_budget.PASSES.items()}
    experts = config.num_hidden_layers * config.num_experts
    yield Step("evaluate, 300 questions", 300, 0, 1, weights)
    yield Step("measure, two data sets of 500", 1000, 1.2, 0, weights)
    yield Step("atlas, two data sets of 500", 1000, 1.2, 0, weights + outputs)
    yield Step("tune the routers, 3,000 questions three times", train, training["router"], 0, budget["router"])
    yield Step("… and answer 746 of dev after each time", dev, 0, 1, budget["router"])
    yield Step("intervene, scores of 1,000", 1000, 2, 0, weights)
    yield Step("… and 300 answered 23 times", 300, 0, 23, weights)
    yield Step("find, attribution of 300", 300, 2 * 2, 0, budget["router"])
    yield Step(f"find, each of {experts:,} experts zeroed, 100 answers", 100, experts / 5, 0, weights)
    yield Step("tune eight experts of each layer", train, training["CEFT"], 0, budget["CEFT"])


def rows() -> Iterator[dict[str, object]]:
    """Each step with its memory and its times."""
    counts = parameter_counts(OLMOE.skeleton())
    for step in steps():
        times = {machine: told(step.hours(counts.activated, counts.total, machine)) for machine in OPERATIONS}
        yield {"step": step.name, "memory (GB)": round(step.memory)} | times


def told(hours: float) -> str:
    """A time in the unit that suits it, with two digits."""
    seconds, minutes = hours * 3600, hours * 60
    for value, unit in ((seconds, "s"), (minutes, "min"), (hours, "h")):
        if value < 100:
            return f"{value:.2g} {unit}"
    return f"{hours / 24:.2g} days"


def main() -> None:
    """Print the table of docs/olmoe.md."""
    table = pd.DataFrame(rows())
    console.say(markdown([list(table), *table.itertuples(index=False)]))


if __name__ == "__main__":
    console.run(main)
