"""The words of a page, explained: scores of answers and of experts, tasks of the organism, and the paper's own."""

import re

MEANINGS = {
    "CE": "context-faithful experts: of each layer those that the router-tuned model selects most often (the score ce)",
    "OE": "original experts: of each layer those that the base model selects most often (the score oe)",
    "RT": "router-tuned: only the routers are trained",
    "CEFT": "context-faithful expert fine-tuning: only the CE are trained",
    "ESFT": "expert-specialised fine-tuning: only the experts that the base model selects most on the task are trained",
    "FFT": "full fine-tuning: everything is trained",
    "EM": "exact match: the share of answers that equal a gold answer after SQuAD's normalisation",
    "em": "exact match, EM",
    "F1": "overlap of an answer's words with those of the gold answer, SQuAD",
    "f1": "overlap of words, F1",
    "memory": "the share of answers that say what the model remembers where the context contradicts it",
    "memory_ratio": "of the answers that are memory's or the context's, the share of memory's (M_R)",
    "CAG": "context attention gain: how much more the tuned model attends to the context (Eq. 11)",
    "AAG": "answer attention gain: the same of the answer's tokens in the context (Eq. 11)",
    "APG": "answer probability gain: how much more probable the answer is to the tuned model (Eq. 12)",
    "ce": "score: selection frequency in the router-tuned model, the paper's context-dependence ratio (Eq. 8)",
    "oe": "score: selection frequency in the base model",
    "esft-token": "score: share of all tokens' selections in the base model (ESFT)",
    "esft-gate": "score: mean softmax probability while selected, base model (ESFT)",
    "reap": "score: mean of gating weight times norm of the expert's output (REAP)",
    "ean": "score: summed norm of the expert's output (EAN)",
    "contrast": "score: activation rate on one side, such as with the context, minus that on another",
    "attribution": "score: first-order effect of the expert's gating weight on a target, such as the answer",
    "attribution-add": "score: first-order effect of the expert's output, also where it is not selected",
    "attribution-logit": "score: first-order effect of the expert's router logit",
    "step": "score: selection frequency after one gradient step of the routers",
    "effect": "score: fall of the answer's log-probability when the expert alone is masked, exact",
    "forced": "score: rise of the answer's log-probability when the expert is always selected, exact",
    "dla": "score: what the expert writes along context's minus memory's first token",
    "planted": "the experts that pretraining of organism:planted made read the context, the known truth",
    "zero": "masking: the gating weight becomes 0, nothing else changes",
    "renormalize": "masking: the gating weight becomes 0, the others are rescaled to the old sum",
    "reroute": "masking: the expert is taken away before the selection, so that the next one steps in",
    "below_random": "how much lower the score is than under random sets of experts of the same shape",
    "random_p": "p-value that a set is one of these random sets; with 20 of them at least 1/21",
    "swap": "task: a known subject whose context contradicts what the model knows; the context's answer is right",
    "novel": "task: an unknown subject, to be answered from the context",
    "consistent": "task: a known subject whose context says what the model knows",
    "hops": "task: two facts of the context have to be put together",
    "closed_book": "task: a known subject without any context, to be answered from memory",
    "summary": "task: say what a context says",
    "exam": "task: a known subject, no context and an unusual wording; four values to choose from",
    "otherwise": "task: end a sentence about a known subject as the prompt says and not as memory does; two values",
}
"""A word of the page -> what it means; a score's endings are in ENDINGS."""

ENDINGS = {
    "-last": "of the last token of the prompt alone",
    "-question": "of the question's tokens",
    "-from_question": "from the question on",
    "-all": "of all tokens",
    "-mass": "by gating weight",
    "-gain": "in the tuned model minus in the base model",
    "-tuned": "in the tuned model",
    "-integrated": "averaged along the path on which all gating weights grow from 0",
}


def meaning(word: str) -> str | None:
    """What a word means, a score also with its endings; None where it is not known."""
    if word in MEANINGS:
        return MEANINGS[word]
    for ending, told in ENDINGS.items():
        if word.endswith(ending) and (stem := meaning(word.removesuffix(ending))) is not None:
            return f"{stem}; {told}"
    return None


def words_in(text: str) -> dict[str, str]:
    """The words of a text that have a meaning, with it, in the order of the alphabet."""
    words = set(re.findall(r"[A-Za-z][\w-]*\w", text))
    return {word: told for word in sorted(words, key=str.lower) if (told := meaning(word)) is not None}
