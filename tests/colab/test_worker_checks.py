"""The worker's checks: each thing that can be wrong is found, named and mended; workers are real servers."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from sheily_train.colab import worker_checks
from sheily_train.colab.doctor import examine
from sheily_train.colab.findings import Check, State

pytestmark = pytest.mark.usefixtures("own_home")

REMOTE = ("Trabajador", "Latencia", "Reloj", "Token", "Protocolo")
TOKEN = "un-secreto-de-256-bits"
HTML = b"<!DOCTYPE html><html><head><title>You are about\x1b[31m to visit</title></head></html>"
Answer = tuple[int, dict[str, str], bytes]
App = Callable[[dict[str, Any], Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]


class FakeWorker:
    """A small worker: the answers of each path, and what was asked of it. ``None`` as an answer is none, ever."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.token: str | None = TOKEN
        self.answers: dict[str, Answer | None] = {
            "/health": as_json({"alive": True, "timestamp": now(), "uptime_seconds": 180.0}),
            "/status": as_json(
                {
                    "status": "online",
                    "modelo": "CortezaCognitivaV4",
                    "estadisticas": {"total_batches": 7, "dispositivo": "cuda"},
                }
            ),
            "/info": as_json({"nombre": "OMEGA 21", "version": "4.0"}),
            "/run": as_json({"status": "error"}, 405),
        }

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.asked.append((scope["method"], scope["path"]))
        given = dict(scope["headers"]).get(b"authorization", b"").decode()
        answer = self.answers.get(scope["path"], as_json({"status": "error"}, 404))
        if scope["path"] != "/health" and self.token and given != f"Bearer {self.token}":
            answer = as_json({"status": "error"}, 401)
        if answer is None:
            await asyncio.sleep(30)
            return
        status, headers, body = answer
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": body})


def as_json(value: Any, status: int = 200, **headers: str) -> Answer:
    return status, {"content-type": "application/json", **headers}, json.dumps(value).encode()


def now(**ago: float) -> str:
    return (datetime.now(UTC) - timedelta(**ago)).isoformat()


@contextmanager
def serving(app: Any, lifespan: str = "off") -> Iterator[str]:
    """The app on a socket of its own, in a thread; gives its address."""
    config = uvicorn.Config(app, port=0, log_config=None, lifespan=lifespan, ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def worker() -> FakeWorker:
    return FakeWorker()


@pytest.fixture
def url(worker: FakeWorker) -> Iterator[str]:
    with serving(worker) as address:
        yield address


def remote(url: str | None, token: str | None = TOKEN, **options: Any) -> dict[str, Check]:
    """What is found at a worker, by name; whatever is shown never holds the token."""
    checks = list(examine(url, token, **options))
    for check in checks:
        assert TOKEN not in check.found + check.mend
        assert (check.found + check.mend).isprintable()
        assert check.mend or check.state is not State.BAD
    return {check.name: check for check in checks if check.name in REMOTE}


def test_a_good_worker_is_good_in_every_point(worker: FakeWorker, url: str) -> None:
    """Reached, near, in time, let in, and of our protocol; and only asked, never told anything."""
    found = remote(f"{url}/#token={TOKEN}", None)
    assert {check.state for check in found.values()} == {State.OK}
    assert tuple(found) == REMOTE
    assert found["Trabajador"].found == f"responde en {url}, desde hace 3 min"
    assert found["Token"].found == "vale; CortezaCognitivaV4 en cuda, 7 lotes"
    assert {method for method, _path in worker.asked} == {"GET"}


def test_the_address_may_stand_in_the_environment_or_in_env(url: str, own_home: Path) -> None:
    """As for ``sheily connect``; without one the worker is not looked at, which is no fault."""
    assert remote(None, environment={})["Trabajador"].state is State.WARNING
    assert remote(None, None, environment={"COLAB_SERVER_URL": f"{url}/#token={TOKEN}"})["Token"].state is State.OK
    (own_home / ".env").write_text(f"COLAB_SERVER_URL={url}\nSHEILY_TOKEN={TOKEN}\n")
    assert remote(None, None, environment={})["Token"].state is State.OK


def test_a_worker_of_this_machine_is_asked_by_no_proxy(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``sheily connect`` does: the proxy of a company's network would be given the token."""
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert {check.state for check in remote(url).values()} == {State.OK}


def test_an_address_that_cannot_be_is_explained() -> None:
    """In the words of the address's own error; the token in it is not repeated."""
    found = remote(f"ftp://host/#token={TOKEN}")["Trabajador"]
    assert found.state is State.BAD
    assert "https://" in found.found


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((502, {}, b""), "el túnel contesta 502: detrás no hay trabajador"),
        ((530, {"content-type": "text/html"}, HTML), "el túnel contesta 530"),
        ((200, {"content-type": "text/html"}, HTML), "una página web (200) «You are about [31m to visit»"),
        ((404, {"content-type": "text/html"}, HTML), "una página web (404)"),
        ((307, {"location": "https://elsewhere"}, b""), "redirige a otra dirección (307)"),
        ((404, {}, b'{"detail": "Not Found"}'), "contestó 404, pero no como un trabajador OMEGA 21"),
        ((200, {}, b"[" * 100_000), "contestó 200, pero no como un trabajador OMEGA 21"),
        ((200, {"content-length": "50"}, b"{"), "se cortó"),
    ],
)
def test_what_is_no_worker_is_named(worker: FakeWorker, url: str, answer: Answer, said: str) -> None:
    """A tunnel without a worker, a web page, a redirection, another server, a cut answer: which it is, and its mend."""
    worker.answers["/health"] = answer
    found = remote(url)
    assert list(found) == ["Trabajador"]
    assert said in found["Trabajador"].found


def test_an_endless_answer_is_not_read_to_its_end(worker: FakeWorker, url: str, monkeypatch: Any) -> None:
    """A stream that does not stop takes neither the memory nor the patience."""
    monkeypatch.setattr(worker_checks, "_REPLY_LIMIT", 1000)
    worker.answers["/health"] = (200, {}, b" " * 10_000_000 + b'{"alive": true}')
    assert "contestó 200" in remote(url)["Trabajador"].found


def test_nobody_there(monkeypatch: Any, worker: FakeWorker) -> None:
    """A closed port, a name that does not exist, silence, and plain HTTP where TLS was expected."""
    with serving(worker) as url:
        port = url.rpartition(":")[2]
        assert "certificado" in remote(f"https://127.0.0.1:{port}")["Trabajador"].found
        monkeypatch.setattr(worker_checks, "_TIMEOUT", 0.3)
        worker.answers["/health"] = None
        assert "no contestó en" in remote(url)["Trabajador"].found
    assert remote(url)["Trabajador"].found == f"nadie escucha en {url}"
    assert "no existe ningún «nadie.invalid»" in remote("https://nadie.invalid")["Trabajador"].found


@pytest.mark.parametrize(("token", "said"), [("otro-token", "no lo acepta"), (None, "pide uno")])
def test_a_token_that_is_not_right(worker: FakeWorker, url: str, token: str | None, said: str) -> None:
    """Wrong or missing: it says which, and where the right one is; the protocol is not asked for then."""
    found = remote(url, token)
    assert found["Token"].state is State.BAD
    assert said in found["Token"].found
    assert "#token=" in found["Token"].mend
    assert "Protocolo" not in found


def test_a_token_that_comes_back_is_not_shown(worker: FakeWorker, url: str) -> None:
    """Not even when a worker repeats it, or when it stands in the address."""
    worker.answers["/status"] = as_json({"status": "online", "modelo": f"eco de {TOKEN}"})
    for found in (remote(url), remote(f"{url}/#token={TOKEN}", None)):
        assert found["Token"].found.startswith("vale; eco de … en")


def test_too_many_wrong_tokens(worker: FakeWorker, url: str) -> None:
    """How long to wait."""
    worker.answers["/status"] = as_json({"status": "error"}, 429, **{"retry-after": "41"})
    assert "Espera 41 s." in remote(url)["Token"].mend


def test_a_worker_without_a_token(worker: FakeWorker, url: str) -> None:
    """On this machine it is right; at a public address it is told."""
    worker.token = None
    assert remote(url, None)["Token"].state is State.OK
    if sys.platform == "linux":  # where 0.0.0.0 is this machine, but does not look so
        found = remote(url.replace("127.0.0.1", "0.0.0.0"))["Token"]
        assert (found.state, found.found) == (State.WARNING, "el trabajador atiende a cualquiera, sin token")


def test_a_status_that_is_none(worker: FakeWorker, url: str) -> None:
    """A worker that lives, but whose state is not one."""
    worker.answers["/status"] = as_json({"status": "?"})
    assert "/status contestó 200" in remote(url)["Token"].found


@pytest.mark.parametrize(
    ("info", "run", "state"),
    [
        ({"protocol": 1}, 404, State.OK),
        ({"protocol": 2}, 404, State.BAD),
        ({}, 405, State.OK),
        ({}, 400, State.OK),
        ({}, 404, State.WARNING),
    ],
)
def test_the_protocol(worker: FakeWorker, url: str, info: dict[str, int], run: int, state: State) -> None:
    """Ours, another, or plain v4.0, which works without the promise."""
    worker.answers |= {"/info": as_json(info), "/run": as_json({}, run)}
    assert remote(url)["Protocolo"].state is state


@pytest.mark.parametrize(
    ("timestamp", "said"),
    [
        (lambda: now(minutes=-2), "atrasa 1"),
        (lambda: now(minutes=2), "adelanta 12"),
        (lambda: (datetime.now(UTC) - timedelta(minutes=2)).timestamp(), "adelanta 12"),
        (lambda: "2020-01-01T00:00:00", "a la par"),  # no time zone: the Date header counts
        (lambda: None, "a la par"),
    ],
)
def test_the_clock(worker: FakeWorker, url: str, timestamp: Callable[[], Any], said: str) -> None:
    """Which one is ahead, and by how much, from the worker's own time or from the header."""
    worker.answers["/health"] = as_json({"alive": True, "timestamp": timestamp()})
    found = remote(url)["Reloj"]
    assert said in found.found
    assert found.state is (State.OK if "a la par" in said else State.WARNING)


def test_a_slow_way_is_told(url: str, monkeypatch: Any) -> None:
    """With what it means."""
    monkeypatch.setattr(worker_checks, "_SLOW", 0.0)
    assert remote(url)["Latencia"].state is State.WARNING


def test_the_real_worker_is_good_and_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind its own guard: the right token is good, a wrong one is not, and no run is made by looking."""
    from sheily_train.colab.worker import WorkerSettings, create_app

    monkeypatch.setattr(worker_checks, "_TIMEOUT", 60.0)  # its first model is made meanwhile
    app = create_app(WorkerSettings(state_dir=tmp_path / "worker", token=TOKEN, device="cpu"))
    with serving(app, lifespan="on") as url:
        assert {name: check.state for name, check in remote(url).items()} == dict.fromkeys(REMOTE, State.OK)
        assert "no lo acepta" in remote(url, "otro-token")["Token"].found
        assert "pide uno" in remote(url, None)["Token"].found
    assert not list((tmp_path / "worker").rglob("*.safetensors"))
