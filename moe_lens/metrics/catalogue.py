"""Every metric of answers by its name: what it is, where it comes from, and what it is computed from."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.errors import MoELensError
from moe_lens.extras import optional
from moe_lens.metrics.matching import exact_match, f1
from moe_lens.metrics.text import bleu, meteor, rouge_l
from moe_lens.metrics.wordnet import wordnet

if TYPE_CHECKING:
    from moe_lens.data.example import Example

PREDICTION, OPTIONS, JUDGE = "prediction", "options", "judge"


@dataclass(frozen=True)
class Metric:
    """A score of one answer, in [0, 1]; NaN where it is not defined for the example.

    reads: what `score` takes beside the example: its "prediction" (a text), the log-probabilities of its "options"
        (nats, in their order; None where it has none), or the "judge"'s verdict (None for none).
    source: where it is defined.
    prepare: loads what `score` needs, so that what is missing (MoELensError) is known before a model has run.
    """

    name: str
    about: str
    source: str
    reads: str
    score: Callable[[Any, "Example"], float]
    prepare: Callable[[], object] = lambda: None


def _of_answers(score: Callable[[str, Sequence[str]], float]) -> Callable[[str, "Example"], float]:
    return lambda prediction, example: score(prediction, example.answers)


def _memory(prediction: str, example: "Example") -> float:
    return math.nan if example.original_answer is None else exact_match(prediction, [example.original_answer])


def _accuracy(log_probabilities: Sequence[float] | None, example: "Example") -> float:
    if log_probabilities is None:
        return math.nan
    return float(example.options[int(np.argmax(log_probabilities))] in example.answers)


def _accuracy_per_character(log_probabilities: Sequence[float] | None, example: "Example") -> float:
    if log_probabilities is None:
        return math.nan
    lengths = [len(option) for option in example.options]
    return _accuracy(np.divide(log_probabilities, lengths).tolist(), example)


def _verdict(verdict: bool | None, example: "Example") -> float:
    return math.nan if verdict is None else float(verdict)


_ALL = (
    Metric(
        "em", "equals a gold answer after normalisation", "SQuAD (Rajpurkar et al. 2016)", PREDICTION,
        _of_answers(exact_match),
    ),
    Metric("f1", "highest F1 of words shared with a gold answer", "SQuAD", PREDICTION, _of_answers(f1)),
    Metric(
        "memory", "equals what the model remembers where the context contradicts it (em with original_answer)",
        "M_R of NQ-Swap (Longpre et al. 2021)", PREDICTION, _memory,
    ),
    Metric(
        "bleu", "sentence BLEU-4, all gold answers as references", "sacrebleu (Post 2018)", PREDICTION,
        _of_answers(bleu), partial(optional, "sacrebleu", extra="text"),
    ),
    Metric(
        "meteor", "highest METEOR with a gold answer; needs WordNet", "nltk (Banerjee and Lavie 2005)", PREDICTION,
        _of_answers(meteor), wordnet,
    ),
    Metric(
        "rouge_l", "highest F of the longest common subsequence with a gold answer", "rouge-score (Lin 2004)",
        PREDICTION, _of_answers(rouge_l), partial(optional, "rouge_score.rouge_scorer", extra="text"),
    ),
    Metric(
        "accuracy", "the most probable option is right: log-probabilities of its tokens, summed, not normalised",
        "lm-eval's acc", OPTIONS, _accuracy,
    ),
    Metric(
        "accuracy_per_character", "the same with each sum divided by the option's length in characters",
        "lm-eval's acc_norm", OPTIONS, _accuracy_per_character,
    ),
    Metric(
        "acc_llm", "a judge finds the answer right; unjudged ones are left out and counted", "Appendix D, Table 8",
        JUDGE, _verdict, partial(optional, "openai", extra="judge"),
    ),
)  # fmt: skip

METRICS = {metric.name: metric for metric in _ALL}

DEFAULT_METRICS = ("em", "f1", "memory")


def metrics_named(names: Sequence[str]) -> list[Metric]:
    """The metrics of these names, each once; MoELensError for none or an unknown one."""
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise MoELensError(f"metrics must be of {', '.join(METRICS)}; got {', '.join(map(str, unknown)) or 'none'}")
    return [METRICS[name] for name in dict.fromkeys(names)]
