"""A network in virtual time between a client and whatever worker there is: slow, repeating, lying, out of order.

It is the client's transport. A request that has left goes on when its sender gives up, and an answer may come twice, so
that the worker sees what it sees behind a tunnel.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from random import Random
from typing import NamedTuple

import httpx2

from sheily_train.colab.protocol import SEQ_HEADER

PAGE = b"<!doctype html><html><head><title>gateway error</title></head></html>"
FAULTS = (
    "drop_before",
    "drop_after",
    "502",
    "524",
    "page",
    "page_after",
    "damage",
    "cut",
    "slow",
    "late",
    "twice",
    "old",
)


class Answered(NamedTuple):
    """A worker's whole answer."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


Deliver = Callable[[httpx2.Request], Awaitable[Answered]]
"""Brings a request to the worker that is there; raises :class:`httpx2.ConnectError` or ``ReadError`` when none is."""


class SimulatedNetwork(httpx2.AsyncBaseTransport):
    """The network.

    Args:
        deliver: the other end.
        chance: decides latencies and faults.
        patience: the client's timeout; ``slow`` and ``late`` are longer.

    Attributes:
        fault_share: of requests that something happens to.
        faults: how many there were of each kind.
        history: a hash of all that passed through.
    """

    def __init__(self, deliver: Deliver, chance: Random, patience: float) -> None:
        self.fault_share = 0.0
        self.faults: dict[str, int] = dict.fromkeys(FAULTS, 0)
        self.history = hashlib.sha256()
        self._deliver = deliver
        self._chance = chance
        self._patience = patience
        self._under_way: set[asyncio.Task[httpx2.Response]] = set()
        self._earlier: Answered | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Carry a request and its answer; the carrying outlives the sender's patience."""
        content = await request.aread()
        task = asyncio.create_task(self._carry(request, content))
        self._under_way.add(task)
        task.add_done_callback(self._arrived)
        return await asyncio.shield(task)

    def _arrived(self, task: asyncio.Task[httpx2.Response]) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            task.exception()  # nobody may wait for it any more

    async def _carry(self, request: httpx2.Request, content: bytes) -> httpx2.Response:
        fault = self._chance.choice(FAULTS) if self._chance.random() < self.fault_share else ""
        if fault:
            self.faults[fault] += 1
        self._note(request.method, request.url.path, request.headers.get(SEQ_HEADER), fault)
        await asyncio.sleep(self._latency())
        if fault == "drop_before":
            raise httpx2.ConnectError("dropped")
        if fault in ("502", "524", "page"):
            return _page(200 if fault == "page" else int(fault))
        if fault == "late":
            await asyncio.sleep(self._chance.uniform(1, 3) * self._patience)
        if fault == "damage" and content:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault == "twice":
            await self._deliver(_copy(request, content))
        answer = await self._deliver(_copy(request, content))
        if fault == "slow":
            await asyncio.sleep(self._chance.uniform(1, 3) * self._patience)
        await asyncio.sleep(self._latency())
        return self._hand_over(fault, answer, is_event=SEQ_HEADER in request.headers)

    def _hand_over(self, fault: str, answer: Answered, *, is_event: bool) -> httpx2.Response:
        self._note(answer.status, len(answer.body))
        earlier, self._earlier = self._earlier, answer if is_event else self._earlier
        if fault == "drop_after":
            raise httpx2.ReadError("dropped")
        if fault == "page_after":
            return _page(200)
        if fault == "cut":
            return httpx2.Response(answer.status, headers=answer.headers, stream=_Cut(answer.body))
        if fault == "old" and earlier is not None and is_event:
            answer = earlier
        return httpx2.Response(answer.status, headers=answer.headers, stream=_Whole(answer.body))

    def _note(self, *facts: object) -> None:
        self.history.update(f"{asyncio.get_running_loop().time():.6f} {facts}\n".encode())

    def _latency(self) -> float:
        """Some milliseconds, now and then many: those behind it arrive first."""
        return self._chance.uniform(0.3, 1.0) if self._chance.random() < 0.05 else self._chance.uniform(0.002, 0.05)


class _Whole(httpx2.AsyncByteStream):
    """An answer's body."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._body


class _Cut(_Whole):
    """The first part of a body; then the connection ends."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._body[: len(self._body) // 2]
        raise httpx2.ReadError("cut")


def _copy(request: httpx2.Request, content: bytes) -> httpx2.Request:
    return httpx2.Request(request.method, request.url, headers=request.headers, content=content)


def _page(status: int) -> httpx2.Response:
    return httpx2.Response(status, headers={"Content-Type": "text/html"}, stream=_Whole(PAGE))
