"""BLEU, METEOR and ROUGE-L of longer answers such as summaries, by the packages that the extra `text` installs."""

import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

from moe_lens.data.words import words
from moe_lens.extras import optional
from moe_lens.metrics.matching import checked_answers
from moe_lens.metrics.wordnet import wordnet


def bleu(prediction: str, answers: Sequence[str]) -> float:
    """Sentence BLEU in [0, 1] against all gold answers, by sacrebleu's defaults (Papineni et al. 2002; Post 2018).

    Up to 4-grams, fewer where the texts are shorter (effective order), smoothed exponentially, tokenised as "13a",
    with case. Its mean over examples is not the BLEU of the corpus, which pools the counts.
    """
    sacrebleu = optional("sacrebleu", extra="text")
    score = sacrebleu.sentence_bleu(prediction, list(checked_answers(answers))).score
    return min(1.0, float(score) / 100)


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """The highest F-measure of the longest common subsequence of words with a gold answer, in [0, 1] (Lin 2004).

    By rouge-score: lower case, letters and digits only, no stemming.
    """
    return float(_rouge().score_multi(list(checked_answers(answers)), prediction)["rougeL"].fmeasure)


def rouge_l_unicode(prediction: str, answers: Sequence[str]) -> float:
    """The same with the words of every script: NFKC, cases folded, letters and digits with their marks.

    Where a script puts no spaces between words, each of its characters counts as one.
    """
    return float(_rouge_unicode().score_multi(list(checked_answers(answers)), prediction)["rougeL"].fmeasure)


def meteor(prediction: str, answers: Sequence[str]) -> float:
    """The highest METEOR with a gold answer, in [0, 1] (Banerjee and Lavie 2005), by nltk's defaults.

    Words match by themselves, by their Porter stem, or by WordNet, in which nltk looks up the stems; lower case; each
    text is tokenised (Penn Treebank) without being split into sentences first.
    Raises MoELensError where there is no WordNet.
    """
    nltk = optional("nltk", extra="text")
    references = [nltk.word_tokenize(answer, preserve_line=True) for answer in checked_answers(answers)]
    words = nltk.word_tokenize(prediction, preserve_line=True)
    score = optional("nltk.translate.meteor_score", extra="text").meteor_score
    return float(score(references, words, wordnet=wordnet()))


@cache
def _rouge() -> Any:
    return optional("rouge_score.rouge_scorer", extra="text").RougeScorer(["rougeL"])


@cache
def _rouge_unicode() -> Any:
    return optional("rouge_score.rouge_scorer", extra="text").RougeScorer(["rougeL"], tokenizer=_EveryScript())


class _EveryScript:
    """What rouge-score asks for a text's words."""

    def tokenize(self, text: str) -> list[str]:
        return words(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()))
