"""Every metric of answers by its name: what it is, where it comes from, and what it is computed from."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.errors import MoELensError
from moe_lens.extras import optional
from moe_lens.metrics.matching import exact_match, exact_match_unicode, f1, normalize_answer
from moe_lens.metrics.text import bleu, meteor, rouge_l, rouge_l_unicode
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
    paired: whether it is of the same examples whatever is answered, so that two runs are compared example by example.
    """

    name: str
    about: str
    source: str
    reads: str
    score: Callable[[Any, "Example"], float]
    prepare: Callable[[], object] = lambda: None
    paired: bool = True


def _of_answers(score: Callable[[str, Sequence[str]], float]) -> Callable[[str, "Example"], float]:
    return lambda prediction, example: score(prediction, example.answers)


def same_as_memory(example: "Example") -> bool:
    """Whether a gold answer is also what memory says, after normalisation, so that an answer tells neither."""
    return not {*map(normalize_answer, example.answers)}.isdisjoint(map(normalize_answer, example.memory))


def _memory(prediction: str, example: "Example") -> float:
    if not example.memory or same_as_memory(example):
        return math.nan
    return exact_match(prediction, example.memory)


def _memory_ratio(prediction: str, example: "Example") -> float:
    """Its mean over the examples that are answered by the one or the other is p_o / (p_o + p_s)."""
    memory = _memory(prediction, example)
    return memory if memory == 1 or exact_match(prediction, example.answers) == 1 else math.nan


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
        "memory", "p_o: equals a name of what the model remembers where the context contradicts it",
        "Longpre et al. 2021 (NQ-Swap)", PREDICTION, _memory,
    ),
    Metric(
        "memory_ratio", "M_R = p_o / (p_o + p_s): of the answers that are memory's or the context's, those of memory",
        "Longpre et al. 2021", PREDICTION, _memory_ratio, paired=False,
    ),
    Metric(
        "em_unicode", "em for every script: NFKC, cases folded, punctuation of any script left out",
        "this package, after SQuAD", PREDICTION, _of_answers(exact_match_unicode),
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
        "rouge_l_unicode", "rouge_l with the words of every script; characters where it puts no spaces",
        "rouge-score, words by this package", PREDICTION, _of_answers(rouge_l_unicode),
        partial(optional, "rouge_score.rouge_scorer", extra="text"),
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

OF_MEMORY = ("memory", "memory_ratio")
"""Which say nothing of an example whose answer is also what memory says."""
DEFAULT_METRICS = ("em", "f1", *OF_MEMORY)


def metrics_named(names: Sequence[str]) -> list[Metric]:
    """The metrics of these names, each once; MoELensError for none or an unknown one."""
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise MoELensError(f"metrics must be of {', '.join(METRICS)}; got {', '.join(map(str, unknown)) or 'none'}")
    return [METRICS[name] for name in dict.fromkeys(names)]
