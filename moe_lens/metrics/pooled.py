"""Scores that only many answers have together, given as a number for each, of which the mean is the score.

Their spread is right, too, to first order (the infinitesimal jackknife of the groups, the jackknife of BLEU's counts),
so that intervals and paired differences are those of any other score.
"""

from collections.abc import Sequence

import numpy as np

from moe_lens.extras import optional
from moe_lens.metrics.matching import checked_answers


def group_shares(scores: Sequence[float], groups: Sequence[str]) -> list[float]:
    """A number for each score [sample], of which the mean is the mean over groups of their means; NaN stays NaN.

    m + n / (g n_i) (s_i - m_i): m the mean over groups, n all scores, g the groups, n_i and m_i of the score's own.
    The groups are taken as they are: only the scores within each vary.
    """
    found, names = np.asarray(scores, np.float64), np.asarray(groups)
    known = ~np.isnan(found)
    if not known.any():
        return list(map(float, found))
    of_each, place = np.unique(names[known], return_inverse=True)
    sizes = np.bincount(place)
    means = np.bincount(place, found[known]) / sizes
    weights = known.sum() / (len(of_each) * sizes)
    found[known] = means.mean() + weights[place] * (found[known] - means[place])
    return list(map(float, found))


def corpus_bleu_shares(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """A number for each prediction [sample], of which the mean is BLEU of all, in [0, 1] (Papineni et al. 2002).

    sacrebleu's `corpus_bleu` by its defaults: counts of up to 4-grams and lengths are added up over the sentences, each
    against all of its references. Each number is BLEU plus what leaving the sentence out takes from it, times n - 1,
    about the mean of these.
    """
    sacrebleu = optional("sacrebleu", extra="text")
    sentences = [
        sacrebleu.sentence_bleu(said, list(checked_answers(answers)))
        for said, answers in zip(predictions, references, strict=True)
    ]
    counts = np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in sentences])

    def bleu(summed: np.ndarray) -> float:
        numbers = summed.tolist()
        score = sacrebleu.BLEU.compute_bleu(numbers[:4], numbers[4:8], numbers[8], numbers[9], smooth_method="exp")
        return float(score.score) / 100

    whole, n = counts.sum(0), len(counts)
    if n == 1:
        return [bleu(whole)]
    without = np.array([bleu(whole - own) for own in counts])
    return list(map(float, bleu(whole) + (n - 1) * (without.mean() - without)))
