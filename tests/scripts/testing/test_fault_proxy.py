from __future__ import annotations

import socketserver
import threading
import time
from collections.abc import Iterator

import httpx2
import pytest

from sheily_train.scripts.testing.fault_proxy import FaultProxy

PAUSE = 0.3


class Echo(socketserver.ThreadingTCPServer):
    """A server that answers each request with its number, and notes when what came."""

    daemon_threads = True

    def __init__(self) -> None:
        self.came: list[tuple[float, bytes]] = []
        super().__init__(("127.0.0.1", 0), Answer)
        self.port: int = self.server_address[1]


class Answer(socketserver.BaseRequestHandler):
    server: Echo

    def handle(self) -> None:
        content = self.request.recv(65536)
        self.server.came.append((time.monotonic(), content.partition(b"\r\n\r\n")[2]))
        body = b"%d" % len(self.server.came)
        self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_torn_request_reaches_the_worker_by_half(echo: Echo) -> None:
    """Half of the body arrives, then the connection ends on both sides."""
    with FaultProxy(echo.port, lambda *_request: "torn", pause=PAUSE) as proxy:
        with pytest.raises(httpx2.HTTPError):
            httpx2.post(proxy.url, content=b"0123456789", trust_env=False)
        while not echo.came:
            time.sleep(0.01)
        assert [body for _time, body in echo.came] == [b"01234"]


def test_a_request_comes_again_long_after_its_answer(echo: Echo) -> None:
    """The answer comes at once; the pause passes; the same request comes again; the proxy is not quiet until then."""
    with FaultProxy(echo.port, lambda *_request: "again", pause=PAUSE) as proxy:
        assert httpx2.post(proxy.url, content=b"body", trust_env=False).text == "1"
        assert not proxy.quiet
        while not proxy.quiet:
            time.sleep(0.01)
        (first, body), (second, repeated) = echo.came
        assert (body, repeated) == (b"body", b"body")
        assert second - first >= PAUSE


def test_a_request_is_overtaken_by_the_next_one(echo: Echo) -> None:
    """Of two requests sent one after the other, the second one arrives first."""
    with FaultProxy(echo.port, lambda number, *_request: ("overtaken", "pass")[number], pause=20.0) as proxy:

        def send() -> None:
            httpx2.post(proxy.url, content=b"first", trust_env=False)

        thread = threading.Thread(target=send)
        thread.start()
        while not proxy.seen:
            time.sleep(0.001)
        httpx2.post(proxy.url, content=b"second", trust_env=False)
        thread.join()
        assert [body for _time, body in echo.came] == [b"second", b"first"]
