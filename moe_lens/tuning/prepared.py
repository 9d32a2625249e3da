"""Training data as tokens: examples with their answers, for preferences also with memory's; and what is left out."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from moe_lens.data import Encoded, Example, encode, fit_length
from moe_lens.errors import MoELensError
from moe_lens.lens.lens import MoELens
from moe_lens.lens.taken import expect_known
from moe_lens.tuning.preference import with_rival


@dataclass(frozen=True)
class Prepared:
    """Examples as the lens asks them.

    prompts: with their answers. others: the same with what memory says; none where no answers are compared.
    dropped: examples that were too long. unpaired: those without another answer.
    """

    prompts: tuple[Encoded, ...]
    others: tuple[Encoded, ...] = ()
    dropped: int = 0
    unpaired: int = 0

    @classmethod
    def of(cls, lens: MoELens, examples: Sequence[Example], *, max_length: int | None, pairs: bool) -> "Prepared":
        """pairs: with both answers, each of which has to fit. Raises MoELensError if nothing is left."""
        compared, unpaired = with_rival(examples) if pairs else (examples, ())
        fitted = fit_length(compared, lens.tokenizer, max_length=max_length, template=lens.template, with_answer=True)
        prompts = encoded(lens, fitted.examples)
        if not pairs:
            return cls(tuple(prompts), dropped=len(fitted.dropped))
        others = [
            encode(one, lens.tokenizer, template=lens.template, continuation=one.memory[0].strip())
            for one in fitted.examples
        ]
        expect_known(others, lens.module, lens.tokenizer)
        both = [
            (prompt, other)
            for prompt, other in zip(prompts, others, strict=True)
            if max_length is None or len(other.input_ids) <= max_length
        ]
        if not both:
            raise MoELensError(f"no example is left: with what memory says all have more than {max_length} tokens")
        chosen, rejected = zip(*both, strict=True)
        dropped = len(fitted.dropped) + len(prompts) - len(both)
        return cls(chosen, rejected, dropped=dropped, unpaired=len(unpaired))

    @property
    def digest(self) -> str:
        """What tells these tokens in this order from others."""
        return tokens_digest([*self.prompts, *self.others])


def encoded(lens: MoELens, examples: Sequence[Example]) -> list[Encoded]:
    """The examples as the lens asks them, with their answers."""
    prompts = [encode(example, lens.tokenizer, template=lens.template, with_answer=True) for example in examples]
    expect_known(prompts, lens.module, lens.tokenizer)
    return prompts


def tokens_digest(prompts: Sequence[Encoded]) -> str:
    """A hash of these tokens in this order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.prompt_length} {prompt.input_ids}\n".encode())
    return digest.hexdigest()[:16]
