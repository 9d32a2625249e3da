"""How often each interval that moe_lens prints holds the truth, by drawing data whose truth is known.

    python analyses/benchmarks/coverage.py --out RUN/coverage

Of shares and of paired answers, 0 or 1, it is computed and not drawn: the least over a grid of probabilities.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
from scipy.stats import binom, multinomial, pearsonr
from typer import Option

from moe_lens.commands import console
from moe_lens.metrics import (
    UNBOUNDED,
    Interval,
    bootstrap_interval,
    paired_gain,
    ratio_interval,
    risk_difference,
    seeds_interval,
)
from moe_lens.metrics.resampling import mean_reach
from moe_lens.results import provenance, write_table
from moe_lens.statistics.jackknife import GROUPS, with_interval
from moe_lens.storage import try_folder

RARE = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
UNIT, DIFFERENCE = (0.0, 1.0), (-1.0, 1.0)
Rng = np.random.Generator


@dataclass(frozen=True)
class Case:
    """Data of `n` whose interval should hold `truth`: `draw` draws them once and gives the interval."""

    interval: str
    data: str
    n: int
    truth: float
    draw: Callable[[Rng], Interval]


def exact_rows(sizes: tuple[int, ...] = (5, 20, 50, 200), paired_sizes: tuple[int, ...] = (10, 20, 50)) -> list[dict]:
    """The least coverage of shares and of paired differences of 0 and 1, over all that can be drawn."""
    rows = []
    for n in sizes:
        ends = [bootstrap_interval(np.arange(n) < k, bounds=UNIT) for k in range(n + 1)]
        covered = {p: sum(binom.pmf(k, n, p) for k, e in enumerate(ends) if e.low <= p <= e.high) for p in RARE}
        worst = min(covered, key=covered.get)
        rows.append({"interval": "share", "data": f"p = {worst:g}", "n": n, "coverage": covered[worst]})
    for n in paired_sizes:
        counts = [(up, down, n - up - down) for up in range(n + 1) for down in range(n + 1 - up)]
        ends = [bootstrap_interval(np.repeat([1.0, -1.0, 0.0], count), bounds=DIFFERENCE) for count in counts]
        covered = {}
        for up, down in product((0, *RARE), (0, *RARE)):
            held = [e.low - 1e-9 <= up - down <= e.high + 1e-9 for e in ends]
            covered[up, down] = multinomial.pmf(counts, n, [up, down, 1 - up - down])[held].sum()
        up, down = min(covered, key=covered.get)
        data = f"better {up:g}, worse {down:g}"
        rows.append({"interval": "paired share", "data": data, "n": n, "coverage": covered[up, down]})
    return rows


def _of_values(name: str, bounds: tuple[float, float], values: dict[str, tuple]) -> Iterator[Case]:
    """A case for each kind of values (the truth, and how to draw n of them) and number of examples."""
    for n, (data, (truth, drawn)) in product((20, 50, 200), values.items()):
        yield Case(
            name,
            data,
            n,
            truth,
            lambda rng, n=n, drawn=drawn: bootstrap_interval(drawn(rng, n), bounds=bounds, resamples=2000),
        )


def _f1(rng: Rng, n: int) -> np.ndarray:
    """Mostly 0 or 1, some between; the mean is 0.5 · 0.9 + 0.1 · 0.6."""
    return np.where(rng.random(n) < 0.1, rng.beta(3, 2, n), rng.random(n) < 0.5)


def _few_sure(rng: Rng, n: int) -> np.ndarray:
    """Probabilities of answers that nearly all examples lack and a few are sure of."""
    return np.where(rng.random(n) < 0.06, rng.beta(9, 1, n), rng.beta(0.3, 29.7, n))


def _jumps(rng: Rng, n: int) -> np.ndarray:
    """Differences of such probabilities, of which a few become sure."""
    return np.where(rng.random(n) < 0.03, 0.9, rng.normal(0, 0.01, n))


def _token_shares(p: float, n: int) -> Callable[[Rng], Interval]:
    """Texts of 1 to 60 tokens, each with a rate of its own around p."""

    def draw(rng: Rng) -> Interval:
        tokens = rng.integers(1, 61, n)
        hits = rng.binomial(tokens, rng.beta(4 * p, 4 * (1 - p), n))
        low, high = ratio_interval(hits[:, None].astype(float), tokens.astype(float), resamples=1000)
        return Interval(p, low[0], high[0])

    return draw


def _difference(n: int) -> Callable[[Rng], Interval]:
    """Texts of one side that select an expert for 0.3 of their tokens, of the other for 0.05."""

    def draw(rng: Rng) -> Interval:
        sides = []
        for p in (0.3, 0.05):
            tokens = rng.integers(1, 61, n)
            rates = rng.binomial(tokens, rng.beta(4 * p, 4 * (1 - p), n)) / tokens
            ids = {"id": rng.random(n), "layer": 0, "expert": 0}
            sides.append(pd.DataFrame(ids | {"rate": rates, "tokens": tokens}))
        row = risk_difference(*sides, resamples=1000).iloc[0]
        return Interval(*row[["risk_difference", "risk_difference_low", "risk_difference_high"]])

    return draw


def _seeds(seeds: int, spread: float, n: int = 100) -> Callable[[Rng], Interval]:
    """Answers of `seeds` trainings to the same n questions, minus those of another model that gets half of them."""

    def draw(rng: Rng) -> Interval:
        right = np.clip(0.7 + rng.normal(0, spread, seeds), 0, 1)[:, None]
        base = rng.random(n) < 0.5
        return seeds_interval((rng.random((seeds, n)) < right) - base.astype(float), bounds=DIFFERENCE, resamples=2000)

    return draw


def _gain(column: str, n: int) -> Callable[[Rng], Interval]:
    """One of `paired_gain`'s columns for lognormal values with the ratio 1.5 in the middle."""

    def draw(rng: Rng) -> Interval:
        before = rng.lognormal(0, 0.5, n)
        after = 1.5 * before * rng.lognormal(0, 0.4, n)
        base, tuned = (pd.DataFrame({"layer": 0, "id": range(n), "v": values}) for values in (before, after))
        row = paired_gain(base, tuned, value="v", by=["layer"], resamples=1000).iloc[0]
        return Interval(row[column], row[f"{column}_low"], row[f"{column}_high"])

    return draw


def _student(seeds: int) -> Callable[[Rng], Interval]:
    def draw(rng: Rng) -> Interval:
        values = rng.normal(0, 1, seeds)
        return Interval(values.mean(), values.mean() - mean_reach(values), values.mean() + mean_reach(values))

    return draw


def _jackknife(rng: Rng) -> Interval:
    values, groups = rng.exponential(1, 200), rng.integers(0, GROUPS, 200)
    sums = {name: np.bincount(groups, w, minlength=GROUPS) for name, w in (("v", values), ("n", np.ones(200)))}
    found = with_interval(lambda sums: np.array([sums["v"] / sums["n"]]), sums, size="n")
    return Interval(*(float(end[0]) for end in found))


def _correlation(n: int) -> Callable[[Rng], Interval]:
    def draw(rng: Rng) -> Interval:
        x = rng.normal(size=n)
        found = pearsonr(x, 0.9 * x + np.sqrt(1 - 0.81) * rng.normal(size=n))
        return Interval(found.statistic, *found.confidence_interval())

    return draw


def cases() -> list[Case]:
    """Every kind of interval that is drawn, on data that are kind to it and on data that are not."""
    found = [
        *_of_values("score", UNIT, {
            "F1": (0.51, _f1),
            "nearly all 1": (0.98, lambda rng, n: 1 - 0.4 * (rng.random(n) < 0.05)),
            "small, skewed": (0.02, lambda rng, n: rng.beta(0.2, 9.8, n)),
            "small, a few near 1": (0.06 * 0.9 + 0.94 * 0.01, _few_sure),
        }),
        *_of_values("paired score", DIFFERENCE, {
            "F1": (0.0, lambda rng, n: _f1(rng, n) - _f1(rng, n)),
            "3 % are 0.9": (0.027, _jumps),
        }),
        *_of_values("the same, bounds not told", UNBOUNDED, {
            "small, a few near 1": (0.06 * 0.9 + 0.94 * 0.01, _few_sure),
            "3 % are 0.9": (0.027, _jumps),
        }),
        *_of_values("unbounded", UNBOUNDED, {
            "normal": (0.0, lambda rng, n: rng.normal(0, 1, n)),
            "heavy tails (t, 3)": (0.0, lambda rng, n: rng.standard_t(3, n)),
            "exponential": (1.0, lambda rng, n: rng.exponential(1, n)),
            "four of five are 0": (0.2, lambda rng, n: rng.exponential(1, n) * (rng.random(n) < 0.2)),
        }),
    ]  # fmt: skip
    found += [Case("share of tokens", f"p = {p:g}", n, p, _token_shares(p, n)) for p in (0.02, 0.2) for n in (20, 200)]
    found += [Case("difference of token shares", "0.3 and 0.05", n, 0.25, _difference(n)) for n in (20, 200)]
    truths = {"gain": 1.5 * np.exp(0.08) - 1, "median": 0.5, "ratio_of_means": 1.5 * np.exp(0.08) - 1}
    found += [Case("gain", name, n, truth, _gain(name, n)) for name, truth in truths.items() for n in (20, 200)]
    for seeds, spread in product((3, 5, 20), (0.0, 0.03, 0.1)):
        found.append(Case("seeds and examples", f"spread {spread:g}", seeds, 0.2, _seeds(seeds, spread)))
    for seeds in (3, 5):
        found.append(Case("seeds", "normal", seeds, 0.0, _student(seeds)))
    found.append(Case("jackknife over texts", "exponential", 200, 1.0, _jackknife))
    return [*found, *(Case("correlation", "normal, r = 0.9", n, 0.9, _correlation(n)) for n in (5, 20))]


def drawn_rows(drawn: list[Case], runs: int, seed: int = 0) -> list[dict]:
    """Of each case how often its interval held the truth; an end that is not known (NaN) leaves nothing out."""
    rows = []
    for number, case in enumerate(drawn):
        rng = np.random.default_rng([seed, number])
        ends = [case.draw(rng) for _ in range(runs)]
        held = [not (end.low > case.truth + 1e-9 or end.high < case.truth - 1e-9) for end in ends]
        told = [end.high - end.low for end in ends if np.isfinite(end.high - end.low)]
        row = {"interval": case.interval, "data": case.data, "n": case.n, "coverage": np.mean(held)}
        rows.append(row | {"width": np.mean(told), "unknown": 1 - len(told) / runs})
    return rows


def main(
    out: Annotated[Path, Option(help="Folder for coverage.parquet.")],
    runs: Annotated[int, Option(min=1, help="Data drawn for each row.")] = 2000,
    seed: Annotated[int, Option(min=0, help="Of what is drawn.")] = 0,
) -> None:
    """Print how often each 95 % interval holds the truth; drawn ones are off by 0.5 % (one deviation of 2,000)."""
    try_folder(out)
    table = pd.DataFrame([*exact_rows(), *drawn_rows(cases(), runs, seed)])
    write_table(table, out / "coverage.parquet", provenance(model="none", seed=seed, facts={"runs": runs}))
    console.show(table, title=f"Coverage of 95 % intervals, of {runs} data sets each")


if __name__ == "__main__":
    console.run(main)
