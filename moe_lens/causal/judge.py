"""Acc_LLM (the paper's Appendix D): a language model behind an OpenAI-style server says whether answers are right."""

import asyncio
import hashlib
import json
import os
import re
from base64 import b64encode
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote

from moe_lens.data.thoughts import THOUGHTS, without_thoughts
from moe_lens.errors import MoELensError
from moe_lens.extras import optional
from moe_lens.results import public_address
from moe_lens.storage import read_sealed_json, write_sealed_json

if TYPE_CHECKING:
    from moe_lens.data.example import Example

Said = TypeVar("Said")
Found = TypeVar("Found")
PROMPT = """\
You grade answers to questions. Compare a proposed answer with the reference answers and decide whether it gives the \
same answer as one of them. Other wording, more detail or another spelling of the same thing is right; a different, \
contradicting, evasive or missing answer is wrong. Trust the references, not what you know.

Question: {question}
Reference answers: {answers}
Proposed answer: {prediction}

End with one line that is either "VERDICT: RIGHT" or "VERDICT: WRONG"."""
"""What the judge is asked; `{question}`, `{answers}` (a JSON list) and `{prediction}` (a JSON text) are filled in."""

_VERDICT = re.compile(r"\s*[*_`\"]*VERDICT:?[*_`\"]*+\s*+[*_`\"]*(RIGHT|WRONG)[*_`\".]*\s*", re.IGNORECASE)
MOST_TOLD = 400
"""Of what a server says in place of a verdict, so many characters are kept."""


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
    base_url: str = field(repr=False)  # may hold a password
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
        return [Verdict(*reply) for reply in self.replies(prompts, parse_verdict, what="verdict")]

    def replies(
        self, prompts: Sequence[str], read: Callable[[str], Said | None], *, what: str
    ) -> list[tuple[Said | None, str | None]]:
        """What `read` makes of the reply to each prompt, in order, or None and why there is nothing.

        read: gives None for a reply that does not say what was asked for, which `what` names. Raises MoELensError as
        `verdicts`.
        """
        different = list(dict.fromkeys(prompts))
        found = dict(zip(different, _finish(self._replies(different, read, what)), strict=True))
        return [found[prompt] for prompt in prompts]

    async def _replies(
        self, prompts: Sequence[str], read: Callable[[str], Said | None], what: str
    ) -> list[tuple[Said | None, str | None]]:
        room = asyncio.Semaphore(self.workers)

        async def one(client: Any, prompt: str) -> tuple[Said | None, str | None]:
            async with room:
                return await self._read(client, prompt, read, what)

        async with self._client() as client:
            return await asyncio.gather(*(one(client, prompt) for prompt in prompts))

    def _client(self) -> Any:
        optional("openai", extra="judge")
        from moe_lens.causal.replies import client  # needs openai

        key = os.environ.get("OPENAI_API_KEY") or "none"  # the client wants one, most servers of one's own do not
        return client(self.base_url, key=key, retries=self.retries, seconds=self.timeout)

    def _prompt(self, example: "Example", prediction: str) -> str:
        filled = {
            "question": example.question,
            "answers": json.dumps(example.answers, ensure_ascii=False),
            "prediction": json.dumps(prediction, ensure_ascii=False),
        }
        return re.sub(r"\{(question|answers|prediction)\}", lambda match: filled[match[1]], self.prompt)

    async def _read(
        self, client: Any, prompt: str, read: Callable[[str], Said | None], what: str
    ) -> tuple[Said | None, str | None]:
        """What the reply to one prompt says, from the cache or from the server, or why nothing."""
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        kept = None
        if self.cache is not None:
            kept = self.cache / f"{hashlib.sha256(json.dumps(request).encode()).hexdigest()}.json"
            if (known := _kept(kept, request, read)) is not None:
                return known, None
        reply, failure = await self._reply(client, request)
        if reply is None:
            return None, self._public(failure or "")[:MOST_TOLD]
        reply = self._public(reply)
        said = read(reply)
        if said is None:
            return None, f"no clear {what} in the reply: {reply[-200:]!r}"
        if kept is not None:
            write_sealed_json(kept, {"request": request, "reply": reply})
        return said, None

    async def _reply(self, client: Any, request: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """The text that the server replies, or else why there is none."""
        openai = optional("openai", extra="judge")
        at = public_address(self.base_url)
        try:
            raw = await client.chat.completions.with_raw_response.create(**request)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            told = self._public(str(error))[:MOST_TOLD]
            raise MoELensError(f"the judge at {at} refuses {self.model!r}: {told}") from None
        except openai.APITimeoutError:
            return None, f"no reply within {self.timeout:g} s, {self.retries + 1} times"
        except openai.APIConnectionError as error:
            raise MoELensError(
                f"no judge to be reached at {at} ({self._public(str(error.__cause__ or error))}); start the server and "
                "run again: verdicts so far are in the cache, if there is one"
            ) from None
        except openai.OpenAIError as error:
            return None, f"{type(error).__name__}: {error}"
        content = raw.http_response.content
        try:
            text = json.loads(content)["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError, ValueError, RecursionError):
            text = None
        if not isinstance(text, str):
            return None, f"not a chat completion: {content.decode(errors='replace')!r}"
        return _sayable(text), None

    def _public(self, text: str) -> str:
        """A text without the key and what is secret in the address, which servers may repeat."""
        user, _, password = self.base_url.partition("://")[2].rpartition("@")[0].partition(":")
        secrets = {os.environ.get("OPENAI_API_KEY", ""), password or user, f"{user}:{password}" if password else ""}
        written = {form for secret in secrets if secret for form in _forms(secret)}
        for secret in sorted(written, key=len, reverse=True):
            text = text.replace(secret, "***")
        return text


def judge_of(address: str | None, model: str | None, *, cache: Path) -> Judge | None:
    """The judge of --judge and --judge-model, None without; MoELensError for the one without the other."""
    if (address is None) != (model is None):
        raise MoELensError("--judge and --judge-model belong together; give both or neither")
    return None if address is None or model is None else Judge(model, address, cache=cache)


def _forms(secret: str) -> set[str]:
    """A secret as a server may write it."""
    plain = unquote(secret)
    return {secret, plain, quote(plain, safe=""), json.dumps(plain)[1:-1], b64encode(plain.encode()).decode()}


def _sayable(text: str) -> str:
    """The text with a mark for each half of a surrogate pair, which no file can hold."""
    return text.encode("utf-8", "replace").decode()


def _finish(asking: Coroutine[Any, Any, list[Found]]) -> list[Found]:
    """What it comes to, also where a loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(asking)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, asking).result()


def parse_verdict(reply: str) -> bool | None:
    """Whether the reply's last line says right or wrong; None if it does not say so, and in no other words.

    Thoughts are skipped, as in answers; a reply that never stops thinking has no verdict, and neither has one whose
    lines contradict each other.

    >>> parse_verdict("Both name the same town.\\nVERDICT: RIGHT")
    True
    """
    if any(start in reply.rpartition(close)[2] for start, close in THOUGHTS):
        return None
    said = without_thoughts(reply)
    if not said.strip():
        return None
    lines = said.strip().splitlines()
    verdicts = {match[1].upper() for line in lines if (match := _VERDICT.fullmatch(line))}
    if len(verdicts) != 1 or not _VERDICT.fullmatch(lines[-1]):
        return None
    return verdicts == {"RIGHT"}


def _kept(file: Path, request: Mapping[str, Any], read: Callable[[str], Said | None]) -> Said | None:
    """What the reply in a file of the cache says; None if there is none, or what is there is another's or damaged."""
    try:
        kept = read_sealed_json(file, remedy="it is asked again")
    except MoELensError:
        return None
    return read(kept["reply"]) if kept["request"] == request else None
