"""A client for HTTP whose replies have a bounded size and time, whatever the server does."""

import asyncio
from typing import Any

import httpx2
from anyio import TypedAttributeSet
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError

from moe_lens.errors import MoELensError
from moe_lens.results import public_address

MOST_BYTES = 4 * 2**20
"""The longest reply that is read; a completion of 2,048 tokens has some ten thousand bytes."""
TypedAttributeSet.__annotations__ = {"save": object}
"""anyio imports its sockets when they are first used, and refuses what nnsight has put on every class by then."""
_OF_THE_BODY_AS_SENT = {b"content-encoding", b"content-length", b"transfer-encoding"}


class BoundedClient(DefaultAsyncHttpxClient):
    """Reads each reply whole, in at most so many seconds from the request on, and never more than `MOST_BYTES`.

    httpx2 itself bounds the time between two bytes only. Redirects are not followed: their bodies have no bound.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    async def send(
        self, request: httpx2.Request, *, stream: bool = False, auth: Any = None, follow_redirects: Any = False
    ) -> httpx2.Response:
        """The reply, read; httpx2.ReadTimeout for one that takes too long, OpenAIError for one that is too long."""
        given = {} if auth is None else {"auth": auth}
        try:
            async with asyncio.timeout(self._seconds):
                reply = await super().send(request, stream=True, follow_redirects=False, **given)
                try:
                    body = await _read(reply)
                finally:
                    await reply.aclose()
        except httpx2.DecodingError as error:
            raise OpenAIError(f"a reply that cannot be unpacked ({error})") from None
        except TimeoutError:
            raise httpx2.ReadTimeout(f"no whole reply within {self._seconds:g} s", request=request) from None
        headers = [(name, value) for name, value in reply.headers.raw if name.lower() not in _OF_THE_BODY_AS_SENT]
        return httpx2.Response(reply.status_code, headers=headers, content=body, request=request)


async def _read(reply: httpx2.Response) -> bytes:
    body = bytearray()
    async for part in reply.aiter_bytes(2**16):
        body += part
        if len(body) > MOST_BYTES:
            raise OpenAIError(f"a reply of more than {MOST_BYTES:,} bytes")
    return bytes(body)


def client(address: str, *, key: str, retries: int, seconds: float) -> AsyncOpenAI:
    """The client of a server that speaks the OpenAI protocol; MoELensError for what is no address or no key."""
    if not (key.isascii() and key.isprintable()):
        raise MoELensError("OPENAI_API_KEY has characters that no key has, such as a line break; set it anew")
    if "?" in address:
        raise MoELensError("a judge's address ends in its path, such as /v1; give what is secret as OPENAI_API_KEY")
    try:
        at = httpx2.URL(address)
        if not at.host or (at.port or 0) > 65535:
            raise httpx2.InvalidURL("no host or port")
        return AsyncOpenAI(base_url=address, api_key=key, max_retries=retries, http_client=BoundedClient(seconds))
    except (httpx2.InvalidURL, ValueError) as error:
        told = f"expected a judge's address, such as http://localhost:8000/v1; got {public_address(address)!r}"
        raise MoELensError(f"{told} ({type(error).__name__})") from None
