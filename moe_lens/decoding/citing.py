"""ContextCite: which sentences of its context a model's own answer rests on, told by leaving them out at random."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from moe_lens.data import Example, encode
from moe_lens.data.sentences import sentences
from moe_lens.errors import MoELensError
from moe_lens.lens.lens import MoELens

ABLATIONS = 64
PENALTY = 0.01
SUREST = -1e-7
"""The largest log-probability that is told from certainty: float32 knows none nearer to 0."""
WITHOUT_CONTEXT, ONE_SENTENCE, WITHOUT_ANSWER = "without a context", "of one sentence", "without an answer"
COLUMNS = ("place", "id", "question", "answer", "sentence", "start", "stop", "text", "attribution")


@dataclass(frozen=True)
class Citations:
    """What each answer rests on.

    table: one row per example and sentence of its context, columns `COLUMNS`: place (of the example, from 0), id,
        question, answer (the model's own), sentence (from 0), its characters from start to stop in the context, its
        text, and attribution (missing where nothing was left out).
    left: how many examples nothing was left out of, by why.
    """

    table: pd.DataFrame
    left: dict[str, int]

    def __str__(self) -> str:
        """What a command line says of it."""
        told = "".join(f"; {count} {why}" for why, count in self.left.items())
        known = self.table.loc[self.table["attribution"].notna(), "place"]
        return f"the sentences of {known.nunique()} contexts are cited{told}"


def context_citations(
    lens: MoELens,
    examples: Sequence[Example],
    *,
    ablations: int = ABLATIONS,
    seed: int = 0,
    max_new_tokens: int = 16,
    stop: Sequence[str] = (),
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Citations:
    """The model's own answers, and what each sentence of their contexts adds to them, as it is now.

    The attributions are those of `attributions`. Contexts of one sentence, and examples without a context or an answer,
    have none, and are counted.
    """
    settings = {"batch_size": batch_size, "progress": progress}
    answers = lens.generate(examples, max_new_tokens=max_new_tokens, stop=stop, **settings)  # type: ignore[arg-type]
    found = attributions(lens, examples, answers, ablations=ablations, seed=seed, **settings)  # type: ignore[arg-type]
    rows, left = list[tuple[object, ...]](), dict[str, int]()
    for place, (example, answer, own) in enumerate(zip(examples, answers, found, strict=True)):
        parts = sentences(example.context)
        if (why := _why_not(example, answer)) is not None:
            left[why] = left.get(why, 0) + 1
        told = own if own is not None else [None] * len(parts)
        for number, (part, value) in enumerate(zip(parts, told, strict=True)):
            text = example.context[part].strip()
            rows.append(
                (place, example.id, example.question, answer.strip(), number, part.start, part.stop, text, value)
            )
    table = pd.DataFrame(rows, columns=list(COLUMNS)).astype({"attribution": float})
    return Citations(table, left)


def attributions(
    lens: MoELens,
    examples: Sequence[Example],
    answers: Sequence[str],
    *,
    ablations: int = ABLATIONS,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> list[np.ndarray | None]:
    """What each sentence of each example's context adds to the logit of the probability of the answer, [sentence].

    ContextCite (Cohen-Wang et al. 2024): of `ablations` random choices of sentences, each kept with probability 1/2,
    the logit log p - log(1 - p) of the joint probability of the answer's tokens, divided by their number, is explained
    by `sentence_weights`; multiplied by that number, a weight is in nats again. Sentences are those of `sentences`; a
    context of which none is kept is asked closed-book. The same choices are run once.

    answers: the model's own, as `generate` gives them. An example's choices are drawn by `seed` and its texts, whatever
    it stands among. None for an example of which nothing can be left out, or that has no answer.
    Raises MoELensError for fewer than two ablations.
    """
    if ablations < 2:
        raise MoELensError(f"attributions need two or more ablations, better {ABLATIONS}; got {ablations}")
    asked, places, said = list[Example](), list[int](), list[str]()
    drawn: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for place, (example, answer) in enumerate(zip(examples, answers, strict=True)):
        if _why_not(example, answer) is not None:
            continue
        parts = sentences(example.context)
        kept = drawn_ablations(example, len(parts), ablations=ablations, seed=seed)
        distinct, which = np.unique(kept, axis=0, return_inverse=True)
        drawn[place] = kept, which.reshape(-1) + len(asked)
        asked += [keeping(example, parts, row) for row in distinct]
        places += [place] * len(distinct)
        said += [answer] * len(distinct)
    with each_as(lens, places):
        found = lens.answer_log_probabilities(
            asked, continuations=said, with_end=False, batch_size=batch_size, progress=progress
        )
    logs = np.minimum(np.array(found), SUREST)
    logits = logs - np.log(-np.expm1(logs))
    weights: list[np.ndarray | None] = [None] * len(examples)
    for place, (kept, which) in drawn.items():
        tokens = _answer_tokens(lens, examples[place], answers[place])
        weights[place] = sentence_weights(kept, logits[which] / tokens) * tokens
    return weights


def drawn_ablations(example: Example, count: int, *, ablations: int = ABLATIONS, seed: int = 0) -> np.ndarray:
    """Which of so many sentences of the example's context are kept in each ablation, bool [ablation, sentence]."""
    texts = "\0".join((example.context, example.question)).encode()
    draw = np.random.default_rng([seed, *hashlib.sha256(texts).digest()])
    return draw.random((ablations, count)) < 0.5


def sentence_weights(kept: np.ndarray, values: np.ndarray) -> np.ndarray:
    """What keeping each sentence adds to a value, [sentence], by a sparse linear model of it (LASSO).

    kept: bool [ablation, sentence]. values: [ablation]. The penalty, `PENALTY`, is on standardised choices; it takes
    about twice itself off each weight, and leaves nothing of smaller ones.
    """
    from sklearn.linear_model import Lasso
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(kept.astype(np.float64))
    fitted = Lasso(alpha=PENALTY).fit(scaler.transform(kept.astype(np.float64)), values)
    return np.asarray(fitted.coef_ / scaler.scale_)


def keeping(example: Example, parts: Sequence[slice], kept: Sequence[bool] | np.ndarray) -> Example:
    """The example with only these sentences of its context, in their order."""
    context = "".join(example.context[part] for part, stays in zip(parts, kept, strict=True) if stays)
    return replace(example, context=context.strip())


@contextmanager
def each_as(lens: MoELens, places: Sequence[int]) -> Iterator[None]:
    """Inside the block, of interventions that differ by example each example is under those of the one at its place."""
    in_force = [own.take(places) for own in lens.interventions]
    with lens.at_rest(), lens.intervene(*in_force):
        yield


def tell_without_answer(examples: Sequence[Example | str], answers: Sequence[str]) -> None:
    """Warn of examples whose sentences are not left out since the model says nothing."""
    count = sum(not answer.strip() for answer in answers)
    if count:
        warnings.warn(f"{count} of {len(examples)} answers are empty, so that their contexts stay whole", stacklevel=3)


def _why_not(example: Example, answer: str) -> str | None:
    """Why nothing of a context is left out; None where it is."""
    if not example.context.strip():
        return WITHOUT_CONTEXT
    if len(sentences(example.context)) < 2:
        return ONE_SENTENCE
    return None if answer.strip() else WITHOUT_ANSWER


def _answer_tokens(lens: MoELens, example: Example, answer: str) -> int:
    """How many tokens the answer has after the example's prompt, end-of-sequence left out."""
    encoded = encode(example, lens.tokenizer, template=lens.template, continuation=answer)
    return len(encoded.input_ids) - encoded.prompt_length - 1
