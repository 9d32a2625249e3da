"""Exact match and F1 of short answers, by SQuAD's normalisation (Rajpurkar et al. 2016)."""

import re
import string
from collections import Counter
from collections.abc import Sequence

from moe_lens.errors import MoELensError

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, single spaces.

    >>> normalize_answer("The  Mughal Empire!")
    'mughal empire'
    """
    without_articles = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION))
    return " ".join(without_articles.split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction equals one of the gold answers after normalisation, else 0.0."""
    return max(float(normalize_answer(prediction) == normalize_answer(gold)) for gold in checked_answers(answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The highest F1 of words shared with a gold answer, after normalisation, in [0, 1].

    A prediction and a gold answer of which nothing is left match if nothing is left of both (SQuAD 2.0).
    """
    words = normalize_answer(prediction).split()
    return max(_f1(words, normalize_answer(gold).split()) for gold in checked_answers(answers))


def _f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    shared = (Counter(predicted) & Counter(gold)).total()
    return 2 * shared / (len(predicted) + len(gold))


def checked_answers(answers: Sequence[str]) -> Sequence[str]:
    """The gold answers; MoELensError for none, or for a single text instead of a sequence."""
    if isinstance(answers, str) or not answers:
        raise MoELensError(f"expected a sequence of one or more gold answers; got {answers!r}")
    return answers
