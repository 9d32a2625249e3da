"""Exact match and F1 of short answers, by SQuAD's normalisation (Rajpurkar et al. 2016) and by one for all scripts."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

import regex

from moe_lens.errors import MoELensError

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_UNSEEN = regex.compile(r"[\p{P}\p{Cf}\p{Variation_Selector}]")


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, single spaces.

    >>> normalize_answer("The  Mughal Empire!")
    'mughal empire'
    """
    without_articles = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION))
    return " ".join(without_articles.split())


def normalize_unicode(text: str) -> str:
    """The same for every script: compatible forms and widths are one (NFKC), cases folded, no punctuation of any
    script, and no marks that are not seen (of direction, joining, variation).

    >>> normalize_unicode("“ＴＨＥ  Ｓtraße。”")
    'strasse'
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return unicodedata.normalize("NFKC", normalize_answer(_UNSEEN.sub("", folded)))


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction equals one of the gold answers after normalisation, else 0.0."""
    return max(float(normalize_answer(prediction) == normalize_answer(gold)) for gold in checked_answers(answers))


def exact_match_unicode(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction equals one of the gold answers after `normalize_unicode`, else 0.0."""
    return max(float(normalize_unicode(prediction) == normalize_unicode(gold)) for gold in checked_answers(answers))


def contains(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the words of one of the gold answers stand in the prediction in their order, after normalisation.

    A gold answer of which nothing is left is contained where nothing is left of the prediction either.
    """
    said = f" {normalize_answer(prediction)} "
    return max(float(f" {normalize_answer(gold)} " in said) for gold in checked_answers(answers))


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
