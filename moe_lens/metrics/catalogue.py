"""Every metric of answers by its name: what it is, where it comes from, and what it is computed from."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.errors import MoELensError
from moe_lens.extras import optional
from moe_lens.metrics.bounds import UNBOUNDED, Bounds
from moe_lens.metrics.matching import contains, exact_match, exact_match_unicode, f1, normalize_answer
from moe_lens.metrics.pooled import corpus_bleu_shares, group_shares
from moe_lens.metrics.text import bleu, meteor, rouge_l, rouge_l_unicode
from moe_lens.metrics.wordnet import wordnet

if TYPE_CHECKING:
    from moe_lens.data.example import Example

PREDICTION, OPTIONS, JUDGE = "prediction", "options", "judge"
ANSWER, RIVALS = "answer", "rivals"


@dataclass(frozen=True)
class Metric:
    """A score of one answer; NaN where it is not defined for the example.

    reads: what `score` takes beside the example: its "prediction" (a text), the log-probabilities of its "options"
        (nats, in their order; None where it has none), the "judge"'s verdict (None for none), the log-probability of
        the first gold "answer" (nats, end-of-sequence not counted), or those of the first tokens of that answer and of
        what memory says, its "rivals" (None where there is no memory, or both are one token).
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
    bounds: Bounds | None = (0.0, 1.0)
    """The least and the most that it can be; None for (0, 1) where all are 0 or 1, else without bounds."""
    together: Callable[[Sequence[Any], Sequence["Example"]], list[float]] | None = None
    """In place of `score`, for one that only all answers have: a number for each, of which the mean is the metric, and
    the spread what examples change in it, to first order, as `metrics.ratio_of_means` has it; NaN as in `score`."""

    def scores(self, values: Sequence[Any], examples: Sequence["Example"]) -> list[float]:
        """The number of each answer, of which the mean is the metric."""
        if self.together is not None:
            return self.together(values, examples)
        return [self.score(value, example) for value, example in zip(values, examples, strict=True)]

    @property
    def bounds_of_difference(self) -> Bounds | None:
        """The least and the most that two of its scores can differ by; None where `bounds` is."""
        return None if self.bounds is None else (self.bounds[0] - self.bounds[1], self.bounds[1] - self.bounds[0])


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


def _accuracy_over_groups(
    log_probabilities: Sequence[Sequence[float] | None], examples: Sequence["Example"]
) -> list[float]:
    """`group_shares` of the answers that have a score, by the group of their example."""
    scores = [_accuracy(found, example) for found, example in zip(log_probabilities, examples, strict=True)]
    return group_shares(scores, [example.group for example in examples])


def _corpus_bleu(predictions: Sequence[str], examples: Sequence["Example"]) -> list[float]:
    return corpus_bleu_shares(predictions, [example.answers for example in examples])


def _only_together(value: Any, example: "Example") -> float:
    """The score of one answer, which a metric of all together does not have; `expect_single` tells it before."""
    raise AssertionError("a metric of all answers together was asked for the score of one")


def expect_single(metric: Metric) -> None:
    """MoELensError for a metric that only many answers have together."""
    if metric.together is not None:
        raise MoELensError(f"{metric.name} is of all answers together; choose a metric that one answer has, such as em")


def _difference(rivals: tuple[float, float] | None, example: "Example") -> float:
    return math.nan if rivals is None else rivals[0] - rivals[1]


def _verdict(verdict: bool | None, example: "Example") -> float:
    return math.nan if verdict is None else float(verdict)


_ALL = (
    Metric(
        "em", "equals a gold answer after normalisation", "SQuAD (Rajpurkar et al. 2016)", PREDICTION,
        _of_answers(exact_match),
    ),
    Metric("f1", "highest F1 of words shared with a gold answer", "SQuAD", PREDICTION, _of_answers(f1)),
    Metric(
        "contains", "a gold answer's words stand in it in their order, whatever is said around them", "this package",
        PREDICTION, _of_answers(contains),
    ),
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
        "bleu", "mean of sentence BLEU-4, all gold answers as references", "sacrebleu (Post 2018)", PREDICTION,
        _of_answers(bleu), partial(optional, "sacrebleu", extra="text"),
    ),
    Metric(
        "corpus_bleu", "BLEU-4 of all answers together, their counts pooled; not the mean of sentences",
        "sacrebleu (Papineni et al. 2002)", PREDICTION, _only_together,
        partial(optional, "sacrebleu", extra="text"), bounds=UNBOUNDED, together=_corpus_bleu,
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
        "accuracy_over_groups", "the mean over groups, such as MMLU's subjects, of the share that accuracy finds right",
        "Hendrycks et al. 2021 (MMLU)", OPTIONS, _only_together, bounds=UNBOUNDED, together=_accuracy_over_groups,
    ),
    Metric(
        "accuracy_per_character", "the same with each sum divided by the option's length in characters",
        "lm-eval's acc_norm", OPTIONS, _accuracy_per_character,
    ),
    Metric(
        "acc_llm", "a judge finds the answer right; unjudged ones are left out and counted", "Appendix D, Table 8",
        JUDGE, _verdict, partial(optional, "openai", extra="judge"),
    ),
    Metric(
        "answer_log_probability", "log-probability (nats) of the first gold answer, end-of-sequence not counted",
        "this package", ANSWER, lambda found, example: found, bounds=UNBOUNDED,
    ),
    Metric(
        "logit_difference",
        "logit of the gold answer's first token minus that of memory's, after the prompt; undefined where both are one",
        "Wang et al. 2022 (IOI)", RIVALS, _difference, bounds=UNBOUNDED,
    ),
)  # fmt: skip

METRICS = {metric.name: metric for metric in _ALL}

OF_MEMORY = ("memory", "memory_ratio")
"""Which say nothing of an example whose answer is also what memory says."""
DEFAULT_METRICS = ("em", "f1", *OF_MEMORY)


Named = str | Metric | Callable[[str, "Example"], float]
"""What `metrics_named` takes."""


def metrics_named(names: Sequence[Named]) -> list[Metric]:
    """The metrics of these names, each once; MoELensError for none, an unknown one, or two of one name.

    A name with a colon, `package.module:function`, is a function of a prediction and its example that gives a number,
    NaN where it is not defined. Such a function itself is taken too, and a `Metric` of one's own.
    """
    unknown = [name for name in names if isinstance(name, str) and name not in METRICS and ":" not in name]
    if unknown or not names:
        raise MoELensError(
            f"metrics must be of {', '.join(METRICS)}, or package.module:function; got {', '.join(unknown) or 'none'}"
        )
    found = [_metric(name) for name in dict.fromkeys(names)]
    repeated = [one.name for place, one in enumerate(found) if any(one.name == other.name for other in found[:place])]
    if repeated or any(one.name in METRICS and one is not METRICS[one.name] for one in found):
        raise MoELensError(f"different metrics need different names; got {', '.join(one.name for one in found)}")
    return found


def _metric(given: Named) -> Metric:
    if isinstance(given, Metric):
        return given
    if isinstance(given, str):
        return METRICS[given] if given in METRICS else _of_function(_imported(given), given)
    if not callable(given) or not getattr(given, "__name__", "").isidentifier():
        raise MoELensError(
            f"a metric is a name, a Metric or a named function of a prediction and its example; got {given!r}"
        )
    return _of_function(given, given.__name__)


def _of_function(score: Callable[[str, "Example"], float], name: str) -> Metric:
    def scored(prediction: str, example: "Example") -> float:
        value = score(prediction, example)
        if not isinstance(value, (int, float, np.number, np.bool_)):
            raise MoELensError(f"the metric {name} must give a number for each prediction and example; got {value!r}")
        return float(value)

    return Metric(name, "a function of one's own", f"{score.__module__}", PREDICTION, scored, bounds=None)


def _imported(text: str) -> Callable[[str, "Example"], float]:
    """The function `package.module:function`; MoELensError where there is none."""
    module, _, name = text.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise MoELensError(
            f"a metric of your own is package.module:function, importable from here; cannot get {text!r}: {error}"
        ) from None
    if not callable(found):
        raise MoELensError(f"{text} is no function of a prediction and its example; got {found!r:.80}")
    function: Callable[[str, Example], float] = found
    return function
