"""The tables of finding.py and strengthening.py: answers to rows with intervals, p-values corrected, as Markdown."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import ttest_1samp

from moe_lens.causal.evaluation import UNMASKED
from moe_lens.metrics import Interval, compare, holm, seeds_interval
from moe_lens.paper.finders import kind_of
from moe_lens.paper.markdown import markdown, over_seeds
from moe_lens.report.plots.what_is_left import NOTHING
from moe_lens.report.plots.what_is_left import RANDOM as RANDOM_SETS

RANDOM = "random:"
LIKE = "random like "


def scores_of(answers: pd.DataFrame, name: str) -> np.ndarray:
    """EM [seed, question] of one intervention; answers: of one task and mode, with columns seed, intervention, em."""
    own = answers[answers["intervention"] == name]
    return np.stack([part["em"].to_numpy() for _, part in own.groupby("seed")])


def random_scores(answers: pd.DataFrame) -> np.ndarray:
    """EM [seed, set, question] of the random sets."""
    names = [name for name in answers["intervention"].unique() if name.startswith(RANDOM)]
    return np.stack([scores_of(answers, name) for name in names], axis=1)


def below(theirs: np.ndarray, own: np.ndarray) -> tuple[Interval, float]:
    """How much lower `own` is than `theirs`, [seed, question] each, with its interval over both, and a p-value.

    p is the larger of two, as both have to hold: over questions (permutation of the means over seeds) and over seeds
    (Student's, of the means over questions).
    """
    lower = theirs - own
    over_questions = compare(lower.mean(0), np.zeros(lower.shape[1]), bounds=(-1, 1)).p
    if len(lower) == 1:
        return seeds_interval(lower, bounds=(-1, 1)), over_questions
    of_seeds = lower.mean(1)
    alike = np.ptp(of_seeds) < 1e-12  # no spread for a test to go by
    over_trainings = 0.0 if alike else float(ttest_1samp(of_seeds, 0).pvalue)
    return seeds_interval(lower, bounds=(-1, 1)), max(over_questions, over_trainings)


TOLD = {"seconds": "CPU s", "auc": "AUC", "precision": "P@k", "spearman": "rank correlation", "em_dev": "EM left, dev"}
"""What is told of each finder before its set is masked on test."""


def agreement_table(dev: pd.DataFrame) -> str:
    """Each finder against both truths, and what its sets leave on dev; means over seeds. dev: of `Finding.dev`."""
    head, cells = _agreement(dev, tuple(TOLD))
    return markdown([["finder", *head], *([f"`{name}`", *own] for name, own in cells.items())])


def mask_table(dev: pd.DataFrame, answers: pd.DataFrame, verdicts: pd.DataFrame) -> str:
    """What each finder's set leaves on test: the task hit, zeroed and rerouted, against random sets; all others."""
    zero, reroute = (answers[answers["mode"] == mode] for mode in ("zero", "reroute"))
    by_task = dict(iter(zero.groupby("task", sort=False)))
    swap = by_task["swap"]
    names = [name for name in swap["intervention"].unique() if not name.startswith(RANDOM) and name != UNMASKED]
    random = {mode: random_scores(own[own["task"] == "swap"]) for mode, own in (("zero", zero), ("reroute", reroute))}
    lower = {name: below(random["zero"].mean(1), scores_of(swap, name)) for name in names}
    corrected = dict(zip(names, holm([p for _, p in lower.values()]), strict=True))
    found, told = _agreement(dev, ("seconds", "auc", "precision"))
    rows, nothing = [], ["–"] * len(found)
    for name in (UNMASKED, *names):
        left = [str(seeds_interval(scores_of(own, name), bounds=(0, 1))) for own in (swap, reroute)]
        compared = [str(lower[name][0]), f"{corrected[name]:.3f}"] if name in lower else ["–", "–"]
        others = [f"{scores_of(own, name).mean():.2f}" for task, own in by_task.items() if task != "swap"]
        own = verdicts[(verdicts["intervention"] == name) & (verdicts["task"] == "swap")]["verdict"].value_counts()
        rows.append(
            [
                f"`{name}`",
                *told.get(name, nothing),
                *left,
                *compared,
                *others,
                ", ".join(f"{word}: {n}" for word, n in own.items()) or "–",
            ]
        )
    flat = [str(seeds_interval(own.reshape(-1, own.shape[-1]), bounds=(0, 1))) for own in random.values()]
    others = [_random_mean(own) for task, own in by_task.items() if task != "swap"]
    rows.append(["random sets", *nothing, *flat, "–", "–", *others, "–"])
    head = ["set", *found, "`swap` left, zeroed", "rerouted", "below random sets", "p (Holm)"]
    return markdown(
        [[*head, *(f"`{task}`" for task in by_task if task != "swap"), "verdict, of so many routers"], *rows]
    )


def left_table(answers: pd.DataFrame, model: str) -> pd.DataFrame:
    """What masking the set of each kind of finder leaves of swap, as `left_figure` draws it."""
    zero = answers[(answers["mode"] == "zero") & (answers["task"] == "swap")]
    random = random_scores(zero)
    scores = {NOTHING: scores_of(zero, UNMASKED), RANDOM_SETS: random.reshape(-1, random.shape[-1])}
    names = [name for name in zero["intervention"].unique() if not name.startswith(RANDOM) and name != UNMASKED]
    scores |= {kind_of(name): scores_of(zero, name) for name in names}
    found = {name: seeds_interval(own, bounds=(0, 1)) for name, own in scores.items()}
    rows = [{"finder": name, "em": it.mean, "em_low": it.low, "em_high": it.high} for name, it in found.items()]
    return pd.DataFrame(rows).assign(model=model)


def dose_curves(dev: pd.DataFrame) -> str:
    """The dose curves on dev: of each way its strengths, with EM of every task, what was chosen in bold.

    dev: of `dose_table`.
    """
    tasks = list(dict.fromkeys(dev["task"]))
    wide = dev.pivot_table(index=["set", "intervention", "chosen"], columns="task", values="em", sort=False)
    curves: dict[str, list[str]] = {}
    for (way, name, chosen), row in wide.iterrows():
        point = str(name).removeprefix(f"{way} ")
        told = f"{f'**{point}**' if chosen else point}: {' / '.join(f'{row[task]:.2f}' for task in tasks)}"
        curves.setdefault(way, []).append(told)
    head = ["way", f"strength: {' / '.join(f'`{task}`' for task in tasks)}"]
    return markdown([head, *([way, "; ".join(points)] for way, points in curves.items())])


def strengthening_table(test: pd.DataFrame, tuned: pd.DataFrame) -> str:
    """What dev chose, on test: EM of every task, of random ones like it, and how far below router tuning it is."""
    tasks = list(dict.fromkeys(test["task"]))
    single = {task: own.assign(seed=0) for task, own in test.groupby("task")}
    trained = {task: own[own["intervention"] == UNMASKED] for task, own in tuned.groupby("task")}
    of_tuned = {task: scores_of(own, UNMASKED) for task, own in trained.items()}
    swap = single["swap"]
    names = [name for name in swap["intervention"].unique() if not name.startswith(LIKE)]
    likes = {name: _likes(swap, name) for name in names}
    above = {name: below(scores_of(swap, name), of_like) for name, of_like in likes.items() if of_like is not None}
    corrected = dict(zip(above, holm([p for _, p in above.values()]), strict=True)) if above else {}
    rows = []
    for name in names:
        cells = [str(seeds_interval(scores_of(single[task], name), bounds=(0, 1))) for task in tasks]
        own = scores_of(swap, name)
        less = seeds_interval(of_tuned["swap"] - own, bounds=(-1, 1))
        random = [
            f"{like.mean():.2f}" if (like := _likes(single[it], name)) is not None else "–"
            for it in ("swap", "closed_book")
        ]
        p = f"{corrected[name]:.4f}" if name in corrected else "–"
        share = own.mean() / of_tuned["swap"].mean()
        rows.append(["as it is" if name == UNMASKED else name, *cells, *random, p, f"{share:.2f}", str(less)])
    cells = [str(seeds_interval(of_tuned[task], bounds=(0, 1))) for task in tasks]
    rows.append(["router tuning", *cells, "–", "–", "–", "1.00", "0"])
    head = ["way", *(f"`{task}`" for task in tasks), "random like it, `swap`", "random, `closed_book`", "p (Holm)"]
    return markdown([[*head, "share of router tuning's `swap`", "less than router tuning"], *rows])


def _likes(answers: pd.DataFrame, name: str) -> np.ndarray | None:
    """Mean EM [1, question] of the random ones like a point; None where there are none."""
    names = [other for other in answers["intervention"].unique() if other.startswith(f"{LIKE}{name}#")]
    return np.stack([scores_of(answers, other) for other in names]).mean(0) if names else None


def _random_mean(answers: pd.DataFrame) -> str:
    """The mean EM of random sets where they were asked."""
    there = answers["intervention"].str.startswith(RANDOM)
    return f"{answers.loc[there, 'em'].mean():.2f}" if there.any() else "–"


def _agreement(dev: pd.DataFrame, columns: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The heads of those of TOLD that are known, and by finder its cells."""
    there = [name for name in columns if name in dev and dev[name].notna().any()]
    named = dev.groupby("finder", sort=False)
    return [TOLD[it] for it in there], {str(name): [_over(own[it], it) for it in there] for name, own in named}


def _over(values: pd.Series, column: str) -> str:
    """A cell of a column of `agreement_table`."""
    known: pd.Series = values.dropna()
    if not len(known):
        return "–"
    if column == "seconds":
        return f"{known.mean():.0f}"
    return over_seeds(known, bounds=(-1, 1) if column == "spearman" else (0, 1))
