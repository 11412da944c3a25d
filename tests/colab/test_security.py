from __future__ import annotations

import asyncio
import http.client
import logging
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest
import uvicorn
from starlette.types import Message, Receive, Scope, Send

from sheily_train.colab import security
from sheily_train.colab.security import Guard, check_token, new_token
from sheily_train.errors import RequestError

TOKEN = new_token()
RIGHT = (b"authorization", b"Bearer " + TOKEN.encode())
Headers = list[tuple[bytes, bytes]]


class Echo:
    """An app that reads the whole body and tells its length; it remembers what reached it."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []
        self.bodies: list[int] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError("the client left")
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
        self.bodies.append(size)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": str(size).encode()})


def guard(app: Any = None, token: str | None = TOKEN, **limits: Any) -> Guard:
    return Guard(app or Echo(), token, **{"body_limit": 1000, "body_seconds": 5.0, "upload_limit": 5000} | limits)


def scope(method: str = "POST", path: str = "/train_layer2", headers: Headers | None = None) -> Scope:
    return {"type": "http", "method": method, "path": path, "headers": headers or [], "query_string": b""}


def ask(
    app: Any, request: Scope, pieces: tuple[bytes, ...] = (b"",), log: list[str] | None = None
) -> tuple[int, dict[bytes, bytes], bytes]:
    """One request to an ASGI app in process; ``log`` receives the order of reads and writes."""
    log = [] if log is None else log
    queue = list(pieces)
    sent: list[Message] = []

    async def receive() -> Message:
        log.append("read")
        if not queue:
            await asyncio.sleep(3600)
        return {"type": "http.request", "body": queue.pop(0), "more_body": bool(queue)}

    async def send(message: Message) -> None:
        log.append(message["type"])
        sent.append(message)

    asyncio.run(app(request, receive, send))
    start = next(message for message in sent if message["type"] == "http.response.start")
    body = b"".join(message.get("body", b"") for message in sent if message["type"] == "http.response.body")
    return start["status"], dict(start["headers"]), body


def refused(answer: tuple[int, dict[bytes, bytes], bytes]) -> tuple[int, str]:
    """The status and code of a refusal, after a look at its shape."""
    status, headers, body = answer
    content = orjson.loads(body)
    assert content["status"] == "error"
    assert content["error"]
    assert "help" in content
    assert headers[b"content-type"] == b"application/json"
    return status, content["code"]


@pytest.mark.parametrize(
    "given",
    [
        [],
        [(b"authorization", b"")],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"Bearer " + TOKEN[:-1].encode())],
        [(b"authorization", b"Bearer " + TOKEN.encode() + b"x")],
        [(b"authorization", b"Basic " + TOKEN.encode())],
        [(b"authorization", TOKEN.encode())],
        [(b"authorization", b"Bearer \xff\xfe" + "ñé".encode())],
        [(b"x-token", TOKEN.encode())],
    ],
)
def test_without_the_right_token_the_app_is_not_reached(given: Headers) -> None:
    """Absent, cut, padded, non-ASCII and misplaced tokens get 401, and say how to ask."""
    app = Echo()
    answer = ask(guard(app), scope(headers=given))
    assert refused(answer) == (401, "auth")
    assert answer[1][b"www-authenticate"].startswith(b"Bearer")
    assert app.scopes == []


def test_the_token_is_judged_before_a_body_byte_is_read() -> None:
    """The whole refusal is sent before the first read of the body."""
    log: list[str] = []
    request = scope(headers=[(b"content-length", b"300"), (b"authorization", b"Bearer wrong")])
    assert ask(guard(), request, (b"x" * 100, b"x" * 200), log)[0] == 401
    assert log[:2] == ["http.response.start", "http.response.body"]


@pytest.mark.parametrize("scheme", [b"Bearer ", b"bearer ", b"BEARER  "])
def test_the_right_token_passes_and_goes_no_further(scheme: bytes) -> None:
    """The app gets the body, and never the token."""
    app = Echo()
    status, _headers, body = ask(guard(app), scope(headers=[(b"authorization", scheme + TOKEN.encode())]), (b"abc",))
    assert (status, body) == (200, b"3")
    assert TOKEN.encode() not in repr(app.scopes).encode()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200),
        ("HEAD", "/health", 200),
        ("GET", "/docs", 200),
        ("POST", "/health", 401),
        ("OPTIONS", "/health", 401),
        ("OPTIONS", "/train_layer2", 401),
        ("HEAD", "/status", 401),
        ("GET", "/health/", 401),
        ("GET", "/docs/oauth2-redirect", 401),
        ("GET", "//health", 401),
        ("GET", "/HEALTH", 401),
        ("GET", "/openapi.json", 401),
        ("GET", "/metrics", 401),
        ("GET", "/", 401),
        ("TRACE", "/health", 401),
    ],
)
def test_only_health_and_the_empty_docs_page_answer_a_stranger(method: str, path: str, status: int) -> None:
    """Every other method and spelling is refused."""
    assert ask(guard(), scope(method, path))[0] == status


@pytest.mark.parametrize("query", [b"token=%s", b"access_token=%s", b"Authorization=Bearer%%20%s", b"%s"])
def test_a_token_in_the_query_is_none(query: bytes) -> None:
    """Addresses with a query end up in logs and histories: the token counts in its header only."""
    app = Echo()
    request = {**scope("GET", "/status"), "query_string": query % TOKEN.encode()}
    assert refused(ask(guard(app), request)) == (401, "auth")
    assert app.scopes == []


def test_two_authorization_headers_are_refused() -> None:
    """Two readers of one request could pick different ones."""
    wrong = (b"authorization", b"Bearer wrong")
    assert refused(ask(guard(), scope(headers=[RIGHT, wrong]))) == (400, "auth")
    assert refused(ask(guard(), scope(headers=[RIGHT, RIGHT]))) == (400, "auth")


def test_wrong_tokens_are_limited_and_the_right_one_never_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the allowed failures comes 429 with Retry-After, while the owner is served as before."""
    monkeypatch.setattr(security, "WRONG_TOKENS_A_MINUTE", 3)
    guarded = guard()
    wrong = scope(headers=[(b"authorization", b"Bearer wrong")])
    assert [ask(guarded, wrong)[0] for _ in range(5)] == [401, 401, 401, 429, 429]
    answer = ask(guarded, wrong)
    assert refused(answer) == (429, "auth")
    assert 1 <= int(answer[1][b"retry-after"]) <= 60
    assert ask(guarded, scope(headers=[RIGHT]))[0] == 200
    assert ask(guarded, scope())[0] == 401  # no token is no guess


def test_a_length_over_the_limit_is_refused_unread() -> None:
    """What Content-Length admits is refused before the app runs."""
    app = Echo()
    for length in (b"1001", b"9" * 5000):
        assert refused(ask(guard(app), scope(headers=[RIGHT, (b"content-length", length)]))) == (413, "too_large")
    for length in (b"-1", b"1e3", b"", "٣".encode()):
        assert ask(guard(app), scope(headers=[RIGHT, (b"content-length", length)]))[0] == 400
    assert app.scopes == []


@pytest.mark.parametrize("claim", [[(b"content-length", b"10")], [(b"transfer-encoding", b"chunked")], []])
def test_a_body_is_counted_while_it_streams(claim: Headers) -> None:
    """A length that lies, and chunks without end, are cut off at the limit; the app sees a client that left."""
    app = Echo()
    pieces = tuple(b"x" * 100 for _ in range(50))
    assert refused(ask(guard(app), scope(headers=[RIGHT, *claim]), pieces)) == (413, "too_large")
    assert app.bodies == []
    assert ask(guard(app), scope(headers=[RIGHT, *claim]), pieces[:10])[2] == b"1000"


def test_what_the_app_says_after_a_refusal_is_dropped() -> None:
    """Frameworks answer 400 when a client leaves in mid-body: the client has had its one answer by then."""

    async def stubborn(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        await send({"type": "http.response.start", "status": 400, "headers": []})
        await send({"type": "http.response.body", "body": b"late"})

    log: list[str] = []
    pieces = tuple(b"x" * 100 for _ in range(50))
    status, _headers, body = ask(guard(stubborn), scope(headers=[RIGHT]), pieces, log)
    assert status == 413
    assert b"late" not in body
    assert log.count("http.response.start") == 1


def test_little_of_a_strangers_body_is_read_after_the_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for an honest sender to see the answer; not an endless one."""
    monkeypatch.setattr(security, "_LINGER_BYTES", 1000)
    log: list[str] = []
    pieces = tuple(b"x" * 100 for _ in range(50))
    assert ask(guard(), scope(headers=[(b"transfer-encoding", b"chunked")]), pieces, log)[0] == 401
    assert log.count("read") == 10


def test_the_upload_limit_is_for_put_state_only() -> None:
    """A state may be longer than a batch; nothing else may."""
    pieces = (b"x" * 2500, b"x" * 2500)
    headers = [RIGHT, (b"content-length", b"5000")]
    assert ask(guard(), scope("PUT", "/state", headers), pieces)[2] == b"5000"
    assert ask(guard(), scope("POST", "/state", headers), pieces)[0] == 413
    assert ask(guard(), scope("PUT", "/status", headers), pieces)[0] == 413
    assert ask(guard(), scope("PUT", "/state", [RIGHT]), (*pieces, b"x"))[0] == 413


def test_a_body_that_stops_arriving_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time counts for the whole body: pieces in between gain nothing."""
    monkeypatch.setattr(security, "_LINGER_SECONDS", 0.1)
    app = Echo()
    begun = time.monotonic()
    request = scope(headers=[RIGHT, (b"content-length", b"100")])

    async def trickle(guarded: Guard) -> list[Message]:
        sent: list[Message] = []

        async def receive() -> Message:
            await asyncio.sleep(0.1)
            return {"type": "http.request", "body": b"x", "more_body": True}

        async def send(message: Message) -> None:
            sent.append(message)

        await guarded(request, receive, send)
        return sent

    sent = asyncio.run(trickle(guard(app, body_seconds=0.5)))
    assert sent[0]["status"] == 408
    assert time.monotonic() - begun < 2
    assert app.bodies == []


@pytest.mark.parametrize("encoding", [b"gzip", b"br", b"deflate", b"identity, gzip", b"", b"GZIP"])
def test_compressed_bodies_are_refused(encoding: bytes) -> None:
    """A hundred kilobytes of gzip can be a hundred megabytes."""
    answer = ask(guard(), scope(headers=[RIGHT, (b"content-encoding", encoding)]))
    assert refused(answer) == (415, "encoding")


def test_identity_is_no_compression() -> None:
    """The one coding that changes nothing is allowed, once or more, but not beside another."""
    identity = (b"content-encoding", b"Identity")
    assert ask(guard(), scope(headers=[RIGHT, identity, identity]))[0] == 200
    assert ask(guard(), scope(headers=[RIGHT, identity, (b"content-encoding", b"gzip")]))[0] == 415


@pytest.mark.parametrize(
    "request_scope", [scope("GET", "/health"), scope(), scope(headers=[RIGHT]), scope("GET", "/docs")]
)
def test_every_answer_carries_the_safety_headers(request_scope: Scope) -> None:
    """The app's answers and the guard's own, each header once."""
    start: list[Message] = []

    async def send(message: Message) -> None:
        start.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    asyncio.run(guard()(request_scope, receive, send))
    headers = dict(start[0]["headers"])
    assert len(headers) == len(start[0]["headers"])
    assert headers[b"x-content-type-options"] == b"nosniff"
    assert headers[b"cache-control"] == b"no-store"
    assert headers[b"referrer-policy"] == b"no-referrer"
    assert headers[b"x-frame-options"] == b"DENY"
    assert b"frame-ancestors 'none'" in headers[b"content-security-policy"]
    scripts = b"cdn.jsdelivr.net" in headers[b"content-security-policy"]
    assert scripts == (request_scope["path"] == "/docs")


def test_only_http_and_lifespan_pass() -> None:
    """A websocket is closed before it opens; an unknown kind is not answered; lifespan reaches the app."""
    seen, sent = [], []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("nothing is read")

    for kind in ("websocket", "quic", "lifespan"):
        asyncio.run(guard(app)({"type": kind, "path": "/", "headers": [RIGHT]}, receive, send))
    assert seen == ["lifespan"]
    assert sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([(b"host", b"127.0.0.1:8000")], 200),
        ([(b"host", b"localhost")], 200),
        ([(b"host", b"[::1]:8000")], 200),
        ([(b"host", b"127.0.0.1:8000"), (b"origin", b"http://127.0.0.1:8000")], 200),
        ([(b"host", b"127.0.0.1:8000"), (b"origin", b"https://evil.example")], 403),
        ([(b"host", b"127.0.0.1:8000"), (b"origin", b"null")], 403),
        ([(b"host", b"evil.example:8000")], 403),
        ([(b"host", b"127.0.0.1.evil.example")], 403),
        ([(b"host", b"127.0.0.1@evil.example")], 403),
        ([(b"host", b"[")], 403),
        ([(b"host", b"\xff")], 403),
        ([], 403),
    ],
)
def test_without_a_token_web_pages_of_others_are_refused(headers: Headers, status: int) -> None:
    """A page of another site, or of a name that was bent to 127.0.0.1, cannot use the worker of whoever reads it."""
    assert ask(guard(token=None), scope(headers=headers))[0] == status


@pytest.mark.parametrize("token", ["", "short", "ñ" * 30, "a b" * 10, "x" * 600, "a\r\nX: y" * 5, "+/=" * 10])
def test_tokens_that_cannot_travel_or_can_be_guessed_are_refused(token: str) -> None:
    """A header, and the fragment of an address, must carry it unchanged."""
    with pytest.raises(RequestError):
        check_token(token)


def test_new_tokens_are_256_bits_and_never_twice_the_same() -> None:
    """43 letters of base64 are 256 bits; an empty token is no token."""
    tokens = {check_token(new_token()) for _ in range(100)}
    assert len(tokens) == 100
    assert {len(token) for token in tokens} == {43}
    with pytest.raises(RequestError):
        guard(token=" ")


def test_an_error_of_the_app_is_not_swallowed() -> None:
    """Only the news that a refused client left is."""

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ask(guard(broken), scope(headers=[RIGHT]))


# From here on: real sockets.


@pytest.fixture
def live() -> Iterator[Callable[..., tuple[int, Echo]]]:
    """Starts guarded apps behind uvicorn on ports of their own."""
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(**limits: Any) -> tuple[int, Echo]:
        app = Echo()
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            guard(app, **limits), http="h11", loop="asyncio", ws="none", lifespan="off", log_config=None
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        servers.append((server, thread))
        return listener.getsockname()[1], app

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join(10)


def talk(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    """Send raw bytes, piece by piece, as long as the other end takes them; returns all that it says."""
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
        except OSError:
            pass
        said = b""
        try:
            while piece := connection.recv(65536):
                said += piece
        except OSError:
            pass
        return said


def head(method: str, path: str, *lines: str, token: str | None = TOKEN) -> bytes:
    first = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *lines]
    if token is not None:
        first.append(f"Authorization: Bearer {token}")
    return ("\r\n".join(first) + "\r\n\r\n").encode("utf-8")


def test_a_stranger_in_mid_body_reads_the_refusal(live: Callable[..., tuple[int, Echo]]) -> None:
    """Two megabytes with a wrong token: the sender gets 401, not a reset connection."""
    port, app = live(body_limit=10_000_000)
    for _ in range(5):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("POST", "/train_layer2", b"x" * 2_100_000, {"Authorization": "Bearer wrong"})
        answer = connection.getresponse()
        assert answer.status == 401
        assert orjson.loads(answer.read())["code"] == "auth"
        connection.close()
    assert app.scopes == []


def test_head_and_options_over_a_socket(live: Callable[..., tuple[int, Echo]]) -> None:
    """HEAD gets headers only, OPTIONS the same refusal as any other method."""
    port, _app = live()
    said = talk(port, head("HEAD", "/status", "Connection: close", token=None))
    assert said.startswith(b"HTTP/1.1 401")
    assert said.endswith(b"\r\n\r\n")
    assert talk(port, head("HEAD", "/health", "Connection: close", token=None)).startswith(b"HTTP/1.1 200")
    said = talk(port, head("OPTIONS", "/train_layer2", "Origin: https://evil.example", "Connection: close", token=None))
    assert said.startswith(b"HTTP/1.1 401")
    assert b"access-control" not in said.lower()


def test_a_chunked_flood_is_cut_off_with_little_memory(live: Callable[..., tuple[int, Echo]]) -> None:
    """Chunks without end: 413, a closed connection, and no more memory than the limit and what is on its way."""
    port, app = live(body_limit=100_000)
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    tracemalloc.start()
    said = talk(port, head("POST", "/train_layer2", "Transfer-Encoding: chunked"), *[chunk] * 400)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert said.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in said.lower()
    assert peak < 4_000_000
    assert app.bodies == []


def test_a_flood_without_a_token_is_cut_off_too(live: Callable[..., tuple[int, Echo]]) -> None:
    """The refusal comes at once, and the connection does not stay open for the rest."""
    port, app = live()
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    said = talk(port, head("POST", "/train_layer2", "Transfer-Encoding: chunked", token="ñ"), *[chunk] * 400)
    assert said.startswith(b"HTTP/1.1 401")
    assert app.scopes == []


def test_lying_lengths_over_a_socket(live: Callable[..., tuple[int, Echo]]) -> None:
    """More bytes than said are not read as body; fewer end in 408; none of both reaches the app as a whole body."""
    port, app = live(body_seconds=0.5)
    said = talk(port, head("POST", "/train_layer2", "Content-Length: 10", "Connection: close"), b"x" * 5000)
    assert said.startswith(b"HTTP/1.1 200")
    assert app.bodies == [10]
    said = talk(port, head("POST", "/train_layer2", "Content-Length: 100"), b"x" * 10)
    assert said.startswith(b"HTTP/1.1 408")
    assert app.bodies == [10]


def test_slow_loris_bodies_end_in_time(live: Callable[..., tuple[int, Echo]]) -> None:
    """Forty connections that drip a byte at a time are all shut within the time, and the owner is served meanwhile."""
    port, app = live(body_seconds=1.0)
    ends: list[bytes] = []
    drip = [b"x"] * 60

    def loris() -> None:
        ends.append(talk(port, head("POST", "/train_layer2", "Content-Length: 1000"), *drip, pause=0.1))

    threads = [threading.Thread(target=loris) for _ in range(40)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    begun = time.monotonic()
    assert talk(port, head("GET", "/status", "Connection: close")).startswith(b"HTTP/1.1 200")
    assert time.monotonic() - begun < 1
    for thread in threads:
        thread.join()
    assert [end[:12] for end in ends] == [b"HTTP/1.1 408"] * 40
    assert len(app.bodies) == 1


def test_an_unread_body_does_not_hold_a_public_answer_open(live: Callable[..., tuple[int, Echo]]) -> None:
    """A stranger's GET /health that promises a body and drips it is answered and shut, not kept."""
    port, _app = live(body_seconds=0.5)
    begun = time.monotonic()
    talk(port, head("GET", "/health", "Content-Length: 1000", token=None), *[b"x"] * 50, pause=0.1)
    assert time.monotonic() - begun < 3
    said = talk(port, head("GET", "/health", "Content-Length: 1000", token=None), b"x")
    assert b"connection: close" in said.lower()


def test_the_token_is_in_no_log(live: Callable[..., tuple[int, Echo]], caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the server and the guard log at the chattiest level, it is never the token, right or wrong."""
    caplog.set_level(logging.DEBUG)
    port, _app = live()
    wrong = new_token()
    for token in (TOKEN, wrong):
        talk(port, head("POST", f"/status?token={wrong}", "Content-Length: 5000", token=token), b"x")
        talk(port, head("GET", "/status", "Connection: close", token=token))
    assert TOKEN not in caplog.text
    assert f"Bearer {wrong}" not in caplog.text
