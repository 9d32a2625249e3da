"""Acc_LLM (the paper's Appendix D): a language model behind an OpenAI-style server says whether answers are right."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lens.errors import MoELensError
from moe_lens.extras import optional
from moe_lens.results import write_json

if TYPE_CHECKING:
    from moe_lens.data.example import Example

PROMPT = """\
You grade answers to questions. Compare a proposed answer with the reference answers and decide whether it gives the \
same answer as one of them. Other wording, more detail or another spelling of the same thing is right; a different, \
contradicting, evasive or missing answer is wrong. Trust the references, not what you know.

Question: {question}
Reference answers: {answers}
Proposed answer: {prediction}

End with one line that is either "VERDICT: RIGHT" or "VERDICT: WRONG"."""
"""What the judge is asked; `{question}`, `{answers}` (a JSON list) and `{prediction}` (a JSON text) are filled in."""

_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_VERDICT = re.compile(r"\s*[*_`\"]*VERDICT:?[*_`\"]*\s*[*_`\"]*(RIGHT|WRONG)[*_`\".]*\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Verdict:
    """right: whether the answer is; None where there is no verdict, and `failure` says why."""

    right: bool | None
    failure: str | None = None


@dataclass(frozen=True)
class Judge:
    """A model behind a server that speaks the OpenAI chat protocol (vLLM, `transformers serve`, a paid one).

    model: its name there. base_url: the server's, up to and including /v1. The environment variable OPENAI_API_KEY
        is sent as the key, where set.
    cache: folder that keeps each reply with a verdict; the same question is then not asked again. None keeps nothing.
    retries: of requests that failed for a passing reason (connection, timeout, 408, 409, 429, 5xx), each later than
        the one before, or when the server says. timeout: of one request, in seconds.
    max_tokens: longest reply, thinking included. workers: requests at a time.
    """

    model: str
    base_url: str
    cache: Path | None = None
    prompt: str = PROMPT
    retries: int = 5
    timeout: float = 120.0
    max_tokens: int = 2048
    workers: int = 8

    def verdicts(self, examples: Sequence["Example"], predictions: Sequence[str]) -> list[Verdict]:
        """One verdict per prediction, in order; equal questions are asked once.

        A request that fails for good, and a reply without one clear verdict, is a `Verdict` without a verdict, never a
        wrong answer. Raises MoELensError for a server that is not there, refuses the key or lacks the model: verdicts
        found so far are in the cache.
        """
        prompts = [self._prompt(*pair) for pair in zip(examples, predictions, strict=True)]
        with self._client() as client, ThreadPoolExecutor(self.workers) as pool:
            futures = {prompt: pool.submit(self._verdict, client, prompt) for prompt in dict.fromkeys(prompts)}
            try:
                found = {prompt: future.result() for prompt, future in futures.items()}
            except MoELensError:
                pool.shutdown(cancel_futures=True)
                raise
        return [found[prompt] for prompt in prompts]

    def _client(self) -> Any:
        key = os.environ.get("OPENAI_API_KEY") or "none"  # the client wants one, most servers of one's own do not
        return optional("openai", extra="judge").OpenAI(
            base_url=self.base_url, api_key=key, max_retries=self.retries, timeout=self.timeout
        )

    def _prompt(self, example: "Example", prediction: str) -> str:
        filled = {
            "question": example.question,
            "answers": json.dumps(example.answers, ensure_ascii=False),
            "prediction": json.dumps(prediction, ensure_ascii=False),
        }
        return re.sub(r"\{(question|answers|prediction)\}", lambda match: filled[match[1]], self.prompt)

    def _verdict(self, client: Any, prompt: str) -> Verdict:
        """The verdict on one prompt, from the cache or from the server."""
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        kept = None
        if self.cache is not None:
            kept = self.cache / f"{hashlib.sha256(json.dumps(request).encode()).hexdigest()}.json"
            if (right := _kept_verdict(kept, request)) is not None:
                return Verdict(right)
        reply, failure = self._reply(client, request)
        if reply is None:
            return Verdict(None, failure)
        right = parse_verdict(reply)
        if right is None:
            return Verdict(None, f"no clear verdict in the reply: {reply[-200:]!r}")
        if kept is not None:
            write_json(kept, {"request": request, "reply": reply})
        return Verdict(right)

    def _reply(self, client: Any, request: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """The text that the server replies, or else why there is none."""
        openai = optional("openai", extra="judge")
        try:
            completion = client.chat.completions.create(**request)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise MoELensError(f"the judge at {self.base_url} refuses {self.model!r}: {error}") from None
        except openai.APITimeoutError:
            return None, f"no reply within {self.timeout:g} s, {self.retries + 1} times"
        except openai.APIConnectionError as error:
            raise MoELensError(
                f"no judge to be reached at {self.base_url} ({error.__cause__ or error}); start the server and run "
                "again: verdicts so far are in the cache, if there is one"
            ) from None
        except (openai.APIError, json.JSONDecodeError, UnicodeDecodeError) as error:
            return None, f"{type(error).__name__}: {error}"
        try:
            text = completion.choices[0].message.content
        except (AttributeError, IndexError, TypeError):
            text = None
        if not isinstance(text, str):
            return None, f"not a chat completion: {str(completion)[:200]!r}"
        return text, None


def parse_verdict(reply: str) -> bool | None:
    """Whether the reply's last line says right or wrong; None if it does not say so, and in no other words.

    Thoughts (<think>…</think>) are skipped; a reply that never stops thinking has no verdict, and neither has one whose
    lines contradict each other.

    >>> parse_verdict("Both name the same town.\\nVERDICT: RIGHT")
    True
    """
    said = _THOUGHT.sub("", reply)
    if "<think>" in said or not said.strip():
        return None
    lines = said.strip().splitlines()
    verdicts = {match[1].upper() for line in lines if (match := _VERDICT.fullmatch(line))}
    if len(verdicts) != 1 or not _VERDICT.fullmatch(lines[-1]):
        return None
    return verdicts == {"RIGHT"}


def _kept_verdict(file: Path, request: Mapping[str, Any]) -> bool | None:
    """The verdict in a file of the cache; None if there is none, or what is there is another's or damaged."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    whole = isinstance(kept, dict) and kept.get("request") == request and isinstance(kept.get("reply"), str)
    return parse_verdict(kept["reply"]) if whole else None
