"""TracedModel: a model of which only configuration and tokenizer are read, measured by what engines say of it."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from moe_lens.architecture import MoEArchitecture
from moe_lens.architecture.listed import normalize
from moe_lens.data import FIGURE_10, Batch, Example, PromptTemplate
from moe_lens.errors import MoELensError
from moe_lens.lens.batching import encode_prompt
from moe_lens.lens.loading import load_skeleton, load_tokenizer
from moe_lens.lens.needs import Statistic, expect_statistics
from moe_lens.lens.record import Record
from moe_lens.traces.formats import read_requests
from moe_lens.traces.request import Request, expect_told, record_of

S = TypeVar("S", bound=Statistic)


class TracedModel:
    """Reads traces of a model and measures them as `MoELens` measures examples; no weights are loaded.

    >>> model = TracedModel.from_pretrained("organism")
    >>> requests = model.read("served.jsonl", load_examples("swap"))
    >>> [usage] = model.measure(requests, ExpertUsage(positions="question"))

    batch_size: requests in a record.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: PromptTemplate = FIGURE_10,
        batch_size: int = 32,
    ) -> None:
        normalize(module)
        self.module, self.tokenizer, self.template, self.batch_size = module, tokenizer, template, batch_size
        self.architecture = MoEArchitecture.of(module)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, template: PromptTemplate = FIGURE_10, trust_remote_code: bool = False
    ) -> "TracedModel":
        """The model of a name, folder or hub id, without its weights; MoELensError if there is none."""
        module = load_skeleton(name, trust_remote_code=trust_remote_code)
        return cls(module, load_tokenizer(name, trust_remote_code=trust_remote_code), template=template)

    def read(self, path: str | Path, examples: Sequence[Example] | None = None) -> list[Request]:
        """The requests of a trace, and of examples, where they are given, ids and spans.

        Raises MoELensError for a trace that is none of this model's, or not of these examples, each once or more.
        """
        found = read_requests(path, self.architecture)
        return found if examples is None else self._of(found, examples)

    def records(self, requests: Sequence[Request], *, batch_size: int | None = None) -> Iterator[Record]:
        """What the requests show, batch by batch, in their order; see `record_of`."""
        size = batch_size or self.batch_size
        return (record_of(requests[start : start + size]) for start in range(0, len(requests), size))

    def measure(
        self,
        requests: Sequence[Request],
        *statistics: S,
        batch_size: int | None = None,
        progress: bool | None = None,
    ) -> tuple[S, ...]:
        """Update each statistic with all requests, and give them back; MoELensError for one that needs the model."""
        expect_statistics(statistics)
        for statistic in statistics:
            if missing := sorted(statistic.needs.captures - {"routing"}):
                raise MoELensError(
                    f"a trace holds no {', '.join(missing)}, which {type(statistic).__name__} needs; run the model"
                )
        for record in self.records(requests, batch_size=batch_size):
            for statistic in statistics:
                statistic.update(record)
        return statistics

    def project_on_vocab(self, residual: Tensor) -> Tensor:
        """MoELensError: no weights are read."""
        raise MoELensError("a trace is measured without the model's weights, so nothing is projected on its vocabulary")

    def _of(self, requests: Sequence[Request], examples: Sequence[Example]) -> list[Request]:
        """The requests with ids and spans of the examples whose prompts they have."""
        prompts = [encode_prompt(n, one, self.tokenizer, template=self.template) for n, one in enumerate(examples)]
        by_ids = {prompt.input_ids: prompt for prompt in prompts}
        times: dict[str, int] = {}
        found = []
        for request in requests:
            expect_told(request)
            prompt = by_ids.get(request.prompt)
            if prompt is None:
                raise MoELensError(self._unlike(request, [one.input_ids for one in prompts]))
            again = times.get(prompt.id, 0)
            times[prompt.id] = again + 1
            spans: dict[str, Any] = {
                "context": prompt.context,
                "question": prompt.question,
                "answer_spans": prompt.answer_spans,
            }
            found.append(replace(request, id=f"{prompt.id}#{again}" if again else prompt.id, **spans))
        if lacking := [prompt.id for prompt in prompts if prompt.id not in times]:
            raise MoELensError(
                f"the trace has no request of {len(lacking)} of {len(prompts)} examples, such as {lacking[0]!r}: it is "
                "truncated; take the same --limit as was served"
            )
        return found

    def _unlike(self, request: Request, prompts: Sequence[tuple[int, ...]]) -> str:
        """Where the prompt of a request is unlike the most similar of these."""
        shared, nearest = max((_shared(request.prompt, one), one) for one in prompts)
        theirs, ours = (self.tokenizer.decode(list(ids[shared : shared + 4])) for ids in (request.prompt, nearest))
        return (
            f"request {request.id!r} is of none of these prompts: the most similar one is the same for {shared} "
            f"tokens, then comes {theirs!r} in the trace and {ours!r} here; serve what the template makes of these "
            "examples"
        )


@dataclass(frozen=True, eq=False, repr=False)
class TraceRun:
    """The prompts of a trace as a run that `Replay` takes: they go where the engine sent them.

    >>> with lens.intervene(Replay(TraceRun(requests))):
    ...     records = lens.records(examples)

    Rows are matched by their prompts' tokens; what was generated is not replayed.
    """

    requests: Sequence[Request]

    def __repr__(self) -> str:
        return f"TraceRun({len(self.requests)} requests)"

    @cached_property
    def digest(self) -> str:
        """What tells the run from others."""
        digest = sha256()
        for one in self.requests:
            digest.update(repr((one.tokens, one.prompt_length, one.layers)).encode())
            digest.update(one.experts.tobytes() + (b"" if one.weights is None else one.weights.tobytes()))
        return digest.hexdigest()

    def records(self, batch: Batch, capture: Collection[str], positions: Any) -> Sequence[Record]:
        """What the trace says of the prompts of a batch; MoELensError for one that it does not have."""
        if missing := sorted(set(capture) - {"routing"}):
            raise MoELensError(f"a trace holds no {', '.join(missing)} that could be put into a run")
        of_rows = []
        for name, ids, prompted in zip(batch.ids, batch.input_ids, self._prompts(batch), strict=True):
            tokens = tuple(ids[prompted].tolist())
            if tokens not in self._by_prompt:
                raise MoELensError(
                    f"the trace has no request with the {len(tokens)} tokens of the prompt of {name!r}; run the same "
                    "prompts, with the same template"
                )
            of_rows.append(replace(self._by_prompt[tokens], id=name))
        return [replace(record_of(of_rows), labels=None)]

    @staticmethod
    def _prompts(batch: Batch) -> Tensor:
        """Where the prompts are, bool [batch, pos]."""
        whole = batch.attention_mask.bool()
        return whole if batch.labels is None else whole & (batch.labels < 0)

    @cached_property
    def _by_prompt(self) -> dict[tuple[int, ...], Request]:
        for request in self.requests:
            expect_told(request)
        return {one.prompt: one.prompt_alone() for one in self.requests}


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    unlike = (n for n, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    return next(unlike, min(len(first), len(second)))
