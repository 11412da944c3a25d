"""A TCP proxy in front of a worker that misbehaves as tunnels do, on real sockets, request by request.

pass          nothing wrong                       cut         half of the answer, then the connection ends
drop_before   the worker never sees the request   torn        half of the request reaches the worker, then it ends
drop_after    it does, its answer is dropped      page        an HTML page with 200; the worker sees nothing
502, 524      a tunnel's own page, before         page_after  the same, after the worker has answered
slow          the answer comes after ``pause``    damage      a bit of the request's body is flipped
late          the request does                    twice       the worker gets the request twice
overtaken     it does, a little: later ones are   again       it does, the second time ``pause`` after its answer
              there first                         echo        the client gets the answer twice
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Self

FAULTS = (
    *("drop_before", "drop_after", "502", "524", "cut", "torn", "page", "page_after", "damage", "slow", "late"),
    *("overtaken", "twice", "again", "echo"),
)
PAGE = b"<!doctype html><html><head><title>ngrok gateway error</title></head><body>ERR_NGROK_3200</body></html>"
_OVERTAKEN_SHARE = 0.1

Plan = Callable[[int, str, str], str]
"""The fault for a request: its number from 0, its method, its path."""


class FaultProxy:
    """The proxy, in a thread of its own.

    Args:
        port: the worker's; may be changed while it runs.
        plan: what to do with each request.
        pause: the seconds of ``slow``, ``late`` and ``again``.

    Attributes:
        seen: method, path and fault of every request.
        connections: how many there have been.
    """

    def __init__(self, port: int, plan: Plan = lambda _number, _method, _path: "pass", *, pause: float = 1.0) -> None:
        self.port, self.plan, self.pause = port, plan, pause
        self.seen: list[tuple[str, str, str]] = []
        self.connections = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self._repeats: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """Where the proxy listens."""
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    @property
    def quiet(self) -> bool:
        """Whether nothing is left that it will still send by itself."""
        return not self._repeats

    def __enter__(self) -> Self:
        self._thread.start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result(5)
        return self

    def __exit__(self, *_error: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        tasks = self._tasks | self._repeats
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101
        self._tasks.add(task)
        self.connections += 1
        try:
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while await self._exchange(reader, writer):
                    pass
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; whether the connection goes on."""
        head, body = await _message(reader)
        method, path = head.split(b" ", 2)[:2]
        fault = self.plan(len(self.seen), method.decode(), path.decode())
        self.seen.append((method.decode(), path.decode(), fault))
        if fault == "drop_before":
            return False
        if fault in ("502", "524", "page"):
            return await _send(writer, _page(200 if fault == "page" else int(fault)))
        if fault == "torn":
            await self._tell(head + body[: len(body) // 2])
            return False
        if fault in ("late", "overtaken"):
            await asyncio.sleep(self.pause if fault == "late" else self.pause * _OVERTAKEN_SHARE)
        if fault == "damage" and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault == "twice":
            await self._ask(head + body)
        answer = await self._ask(head + body)
        if fault == "drop_after":
            return False
        if fault == "slow":
            await asyncio.sleep(self.pause)
        if fault == "again":
            self._repeat_later(head + body)
        if fault == "page_after":
            return await _send(writer, _page(200))
        if fault == "cut":
            await _send(writer, answer[: -max(1, len(answer) // 4)])
            return False
        return await _send(writer, answer * 2 if fault == "echo" else answer)

    async def _ask(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(request)
            await writer.drain()
            head, body = await _message(reader)
            return head + body
        finally:
            writer.close()

    async def _tell(self, piece: bytes) -> None:
        """Send the beginning of a request, and hang up."""
        _reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(piece)
            await writer.drain()
        finally:
            writer.close()

    def _repeat_later(self, request: bytes) -> None:
        async def repeat() -> None:
            await asyncio.sleep(self.pause)
            with suppress(OSError, asyncio.IncompleteReadError):
                await self._ask(request)

        task = self._loop.create_task(repeat())
        self._repeats.add(task)
        task.add_done_callback(self._repeats.discard)


async def _send(writer: asyncio.StreamWriter, content: bytes) -> bool:
    writer.write(content)
    await writer.drain()
    return True


async def _message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body of a request or an answer that tells its length."""
    head = await reader.readuntil(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    return head, await reader.readexactly(int(lengths[0]) if lengths else 0)


def _page(status: int) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n%b" % (status, len(PAGE), PAGE)
