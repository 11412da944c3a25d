from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sheily_train.colab import serve as serving
from sheily_train.colab.security import new_token
from sheily_train.colab.serve import BackgroundWorker, start_in_background, worker_token
from sheily_train.colab.worker import WorkerSettings
from sheily_train.errors import BusyError, RequestError, SheilyError
from tests.colab.test_tunnels import CLOUDFLARED, put_on_path, started, wait_for

SAMPLE = {"samples": [{"input_data": [0.5] * 1600, "anomaly_label": 0}]}


def call(address: str, path: str, content: Any = None, token: str | None = None) -> dict[str, Any]:
    """One request to a worker's address, with the token of its fragment unless another is given."""
    url, _, own = address.partition("#token=")
    request = urllib.request.Request(url + path, None if content is None else json.dumps(content).encode())
    request.add_header("Content-Type", "application/json")
    if token or own:
        request.add_header("Authorization", f"Bearer {token or own}")
    with urllib.request.urlopen(request, timeout=20) as answer:
        result: dict[str, Any] = json.loads(answer.read())
        return result


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(serving.TOKEN_VARIABLE, raising=False)
    return tmp_path / "state"


@pytest.fixture
def begin(state: Path) -> Iterator[Callable[..., BackgroundWorker]]:
    """Starts workers on free ports and stops those that the test left running."""
    workers: list[BackgroundWorker] = []

    def start(folder: Path = state, token: str | None = None, **options: Any) -> BackgroundWorker:
        settings = WorkerSettings(state_dir=folder, token=token)
        worker = start_in_background(settings, **{"port": 0, "notify": lambda _text: None} | options)
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        worker.stop()


def test_it_starts_beside_a_running_loop_and_answers(begin: Callable[..., BackgroundWorker]) -> None:
    """As in a Colab cell: the caller's loop runs on, the worker answers from its own."""

    async def cell() -> dict[str, Any]:
        worker = begin()
        return await asyncio.to_thread(call, worker.address, "/status")

    assert asyncio.run(cell())["status"] == "online"


def test_what_is_shown_is_all_that_a_person_needs(begin: Callable[..., BackgroundWorker], state: Path) -> None:
    """The address on a line of its own, both commands to paste, the folder, the device, how to stop."""
    said: list[str] = []
    worker = begin(notify=said.append, farewell="Ctrl-C guarda y sale.")
    lines = said[0].splitlines()
    assert worker.address in lines
    assert f"  sheily connect '{worker.address}'" in lines
    assert f"  ./conectar_colab.sh '{worker.address}'" in lines
    assert str(state) in said[0]
    assert "cpu" in said[0] or "cuda" in said[0]
    assert lines[-1] == "Ctrl-C guarda y sale."
    url, _, token = worker.address.partition("#token=")
    assert url.startswith("http://127.0.0.1:")
    assert len(token) == 43
    assert said[0].count(token) == 3


def test_the_token_is_asked_for(begin: Callable[..., BackgroundWorker]) -> None:
    """Over the real server: without it 401, except for /health."""
    url = begin().address.partition("#")[0]
    assert call(url, "/health")["alive"] is True
    for token in (None, new_token()):
        with pytest.raises(urllib.error.HTTPError, match="401") as caught:
            call(url, "/status", token=token)
        caught.value.close()


def test_two_workers_never_share_a_folder(begin: Callable[..., BackgroundWorker]) -> None:
    """The second is refused while the first lives, and starts when it has stopped."""
    first = begin()
    with pytest.raises(BusyError, match="Otro trabajador"):
        begin()
    first.stop()
    assert not first.running
    assert call(begin().address, "/status")["status"] == "online"


def test_a_worker_may_be_stopped_from_any_thread(begin: Callable[..., BackgroundWorker]) -> None:
    """The folder is free then too."""
    first = begin()
    thread = threading.Thread(target=first.stop)
    thread.start()
    thread.join()
    assert begin().running


def test_two_processes_never_share_a_folder(begin: Callable[..., BackgroundWorker], state: Path) -> None:
    """The lock holds between processes too."""
    begin()
    code = (
        "import sys; from pathlib import Path; from sheily_train.colab.serve import start_in_background;"
        "from sheily_train.colab.worker import WorkerSettings;"
        "start_in_background(WorkerSettings(state_dir=Path(sys.argv[1])), port=0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(state)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "BusyError" in done.stderr


def test_a_busy_port_is_told_and_leaves_nothing_behind(begin: Callable[..., BackgroundWorker]) -> None:
    """The message names host and port; the folder is free again."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(BusyError, match=f"127.0.0.1:{port}") as caught:
            begin(port=port)
    assert "--port" in caught.value.mend
    assert begin(port=port).address.startswith(f"http://127.0.0.1:{port}#")


def test_a_host_or_folder_that_cannot_be_used(begin: Callable[..., BackgroundWorker], tmp_path: Path) -> None:
    """An address of another machine, and a file where the folder should be, are explained."""
    with pytest.raises(RequestError, match=r"192\.0\.2\.1"):
        begin(host="192.0.2.1")
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="file"):
        begin(tmp_path / "file" / "state")
    with pytest.raises(RequestError, match="file"):
        begin(tmp_path / "file")


@pytest.mark.parametrize(
    "options",
    [
        {"host": "0.0.0.0"},
        {"host": "::"},
        {"host": ""},
        {"host": "192.168.1.5"},
        {"tunnel": "cloudflared"},
        {"tunnel": "ngrok"},
        {"token": "x" * 30},
    ],
)
def test_no_auth_is_for_loopback_only(begin: Callable[..., BackgroundWorker], options: dict[str, Any]) -> None:
    """Nobody opens a worker to the net without a token, not even by mistake."""
    with pytest.raises(RequestError, match="--no-auth"):
        begin(no_auth=True, **options)


def test_no_auth_on_loopback(begin: Callable[..., BackgroundWorker], state: Path) -> None:
    """The address has no fragment, requests no token, and no token is made."""
    worker = begin(no_auth=True)
    assert "#" not in worker.address
    assert call(worker.address, "/status")["status"] == "online"
    assert not (state / "token").exists()


def test_a_tunnel_needs_the_loopback_port(begin: Callable[..., BackgroundWorker]) -> None:
    """Tunnels lead to 127.0.0.1; a worker that listens elsewhere would never be reached."""
    with pytest.raises(RequestError, match=r"192\.168\.1\.5"):
        begin(host="192.168.1.5", tunnel="cloudflared")


def test_where_the_token_comes_from(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given, else the environment's, else the folder's, else a new one; always kept, for its owner's eyes only."""
    state.mkdir()
    file = state / "token"
    first = worker_token(state)
    assert worker_token(state) == first
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    monkeypatch.setenv(serving.TOKEN_VARIABLE, "e" * 30)
    assert worker_token(state) == "e" * 30
    assert worker_token(state, "g" * 30) == "g" * 30
    monkeypatch.delenv(serving.TOKEN_VARIABLE)
    file.chmod(0o644)
    assert worker_token(state) == "g" * 30
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for unusable in ("short", "ñ" * 30):
        with pytest.raises(RequestError):
            worker_token(state, unusable)
    assert worker_token(state) == "g" * 30
    file.write_text("")
    assert len(worker_token(state)) == 43
    for damaged in (b"short", b"\xff\xfe", b"\0" * 44):
        file.write_bytes(damaged)
        with pytest.raises(RequestError, match=f"Borra {file}"):
            worker_token(state)
    file.unlink()
    file.mkdir()
    with pytest.raises(RequestError, match=f"No se puede escribir en {state}"):
        worker_token(state)


def test_the_tokens_file_is_never_open_to_others(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its first moment on, whatever the umask."""
    state.mkdir()
    monkeypatch.setattr(Path, "chmod", lambda *_arguments: None)
    before = os.umask(0)
    try:
        worker_token(state)
    finally:
        os.umask(before)
    assert stat.S_IMODE((state / "token").stat().st_mode) == 0o600


def test_what_was_learned_is_saved_at_the_stop(begin: Callable[..., BackgroundWorker]) -> None:
    """Stop writes a snapshot; the next worker of the folder has the same address token and goes on from it."""
    first = begin()
    call(first.address, "/train_layer2", SAMPLE)
    first.stop()
    first.stop()
    second = begin()
    assert second.address.partition("#")[2] == first.address.partition("#")[2]
    call(second.address, "/train_layer2", SAMPLE)
    assert call(second.address, "/status")["estadisticas"]["total_batches"] == 2


def test_what_outlasts_the_end_is_told_to_try_again(
    begin: Callable[..., BackgroundWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that does not come before the limit is a 503 ``restarted``, and the state is saved all the same."""
    monkeypatch.setattr(serving, "_LAST_ANSWERS_SECONDS", 1)
    worker = begin()
    refused: list[tuple[int, str]] = []

    def upload() -> None:
        url, _, token = worker.address.partition("#token=")
        head = f"POST /train_layer2 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        said, _seconds = raw(url, head.encode() + b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
        refused.append((int(said.split()[1]), json.loads(said.partition(b"\r\n\r\n")[2])["code"]))

    thread = threading.Thread(target=upload)
    thread.start()
    time.sleep(0.3)
    worker.stop()
    thread.join()
    assert refused == [(503, "restarted")]


def test_a_state_that_cannot_be_saved_is_told(begin: Callable[..., BackgroundWorker], state: Path) -> None:
    """The stop raises, and folder and port are free all the same."""
    worker = begin()
    call(worker.address, "/train_layer2", SAMPLE)
    (state / "runs").write_text("no folder")
    with pytest.raises(SheilyError, match="no pudo guardar"):
        worker.stop()
    (state / "runs").unlink()
    begin()


def test_a_process_that_just_ends_saves_too(state: Path) -> None:
    """A notebook's kernel that is restarted in good order runs the worker's stop."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, '.');"
        "from tests.colab.test_serve import SAMPLE, call;"
        "from sheily_train.colab.serve import start_in_background;"
        "from sheily_train.colab.worker import WorkerSettings;"
        "worker = start_in_background(WorkerSettings(state_dir=Path(sys.argv[1])), port=0);"
        "call(worker.address, '/train_layer2', SAMPLE)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(state)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert list((state / "runs").glob("*/*/state.safetensors"))


# What uvicorn alone would not do


def raw(address: str, *parts: bytes, pause: float = 0.0) -> tuple[bytes, float]:
    """Send raw bytes piece by piece; returns what came back and how long the other end kept the line open."""
    port = int(address.partition("#")[0].rpartition(":")[2])
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
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
        return said, time.monotonic() - begun


def test_a_head_that_drips_or_never_comes_is_shut_out(
    begin: Callable[..., BackgroundWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow-loris before the body begins: on a fresh connection, silent or dripping, and on one that was kept."""
    monkeypatch.setattr(serving, "_HEAD_SECONDS", 0.5)
    address = begin().address
    assert raw(address)[1] < 2
    drip = [b"X-A: b\r\n"] * 30
    assert raw(address, b"GET /health HTTP/1.1\r\n", *drip, pause=0.1)[1] < 2
    whole = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    said, seconds = raw(address, whole, b"GET /he", *[b"x"] * 30, pause=0.1)
    assert said.startswith(b"HTTP/1.1 200")
    assert seconds < 2


def test_a_kept_connection_outlives_the_time_for_a_head(
    begin: Callable[..., BackgroundWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time counts only while a head is due: a client may think between two requests."""
    monkeypatch.setattr(serving, "_HEAD_SECONDS", 0.3)
    whole = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    last = whole.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    said, _seconds = raw(begin().address, whole, whole, last, pause=0.8)
    assert said.count(b"HTTP/1.1 200") == 3


def test_a_head_without_end_is_refused(begin: Callable[..., BackgroundWorker]) -> None:
    """Headers are bounded in bytes too."""
    flood = b"X-A: " + b"b" * 1000 + b"\r\n"
    said, _seconds = raw(begin().address, b"GET /health HTTP/1.1\r\n", *[flood] * 100)
    assert b"200 OK" not in said


def test_the_server_says_nothing_of_itself_and_opens_no_websocket(begin: Callable[..., BackgroundWorker]) -> None:
    """No Server header; an upgrade is answered as the plain request it also is."""
    address = begin().address
    token = address.partition("#token=")[2].encode()
    head = b"GET /status HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n"
    said, _seconds = raw(address, head + b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 401")
    said, _seconds = raw(address, head + b"Authorization: Bearer " + token + b"\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 200")
    assert b"\r\nserver:" not in said.lower()


# Tunnels


@pytest.fixture
def cloudflared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    note = put_on_path("cloudflared", CLOUDFLARED, tmp_path / "bin", monkeypatch)
    yield note
    for process in started(note) if note.exists() else []:
        process.kill()


def test_behind_a_tunnel_its_address_is_the_one_shown(
    begin: Callable[..., BackgroundWorker], cloudflared: Path
) -> None:
    """The tunnel leads to the worker's port, and ends with the worker."""
    worker = begin(tunnel="cloudflared")
    url, _, token = worker.address.partition("#token=")
    assert url == "https://four-dashed-words-1.trycloudflare.com"
    local = cloudflared.read_text().split("--url ")[1].split()[0]
    assert call(local, "/status", token=token)["status"] == "online"
    worker.stop()
    assert started(cloudflared) == []


def test_a_tunnel_that_dies_is_opened_again(
    begin: Callable[..., BackgroundWorker], cloudflared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The person reads that it died, and then the new address with the same token; the worker goes on meanwhile."""
    monkeypatch.setattr(serving, "_REOPEN_SECONDS", 0.1)
    said: list[str] = []
    worker = begin(tunnel="cloudflared", notify=said.append)
    started(cloudflared)[0].kill()
    wait_for(lambda: len(said) == 3)
    assert "túnel se cerró" in said[1]
    token = worker.address.partition("#")[2]
    assert f"https://four-dashed-words-2.trycloudflare.com#{token}" in said[2].splitlines()
    assert worker.running
    worker.stop()
    assert started(cloudflared) == []


def test_a_tunnel_that_cannot_be_opened_again_is_tried_until_the_stop(
    begin: Callable[..., BackgroundWorker], cloudflared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each failure is told; stop ends the attempts."""
    monkeypatch.setattr(serving, "_REOPEN_SECONDS", 0.1)
    said: list[str] = []
    worker = begin(tunnel="cloudflared", notify=said.append)
    monkeypatch.setenv("FAKE_MODE", "fail")
    started(cloudflared)[0].kill()
    wait_for(lambda: len(said) >= 4)
    assert "no such host" in said[-1]
    worker.stop()
    count = len(said)
    time.sleep(0.5)
    assert len(said) == count
    assert not any(thread.name == "sheily-tunnel" for thread in threading.enumerate())


def test_a_tunnel_that_does_not_open_leaves_nothing_behind(
    begin: Callable[..., BackgroundWorker], cloudflared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folder and port are free for the next attempt."""
    monkeypatch.setenv("FAKE_MODE", "fail")
    with pytest.raises(SheilyError, match="no such host"):
        begin(tunnel="cloudflared")
    monkeypatch.delenv("FAKE_MODE")
    assert begin(tunnel="cloudflared").running


# How a worker is called by others


@pytest.mark.parametrize(
    ("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]"), ("localhost", "localhost"), ("box", "box")]
)
def test_a_hosts_name_in_an_address(host: str, shown: str) -> None:
    """Numbers of version 6 stand in brackets."""
    assert serving._name_for_others(host) == shown


def test_a_worker_open_to_the_net_shows_an_address_of_this_machine(begin: Callable[..., BackgroundWorker]) -> None:
    """A wildcard cannot be called; and the person is warned that the line is not encrypted."""
    said: list[str] = []
    worker = begin(host="0.0.0.0", notify=said.append)
    assert "0.0.0.0" not in worker.address
    assert call(worker.address, "/health")["alive"] is True
    assert "sin cifrar" in said[-1]


@pytest.mark.parametrize("token", [True, False])
def test_a_body_that_stops_being_http_leaves_no_traceback(
    begin: Callable[..., BackgroundWorker], caplog: pytest.LogCaptureFixture, token: bool
) -> None:
    """A broken chunk, before or while the app answers, is refused or cut off, and nobody can fill the log with it."""
    address = begin().address
    shown = f"Authorization: Bearer {address.partition('#token=')[2]}\r\n" if token else ""
    head = f"POST /train_layer2 HTTP/1.1\r\nHost: x\r\n{shown}Transfer-Encoding: chunked\r\n\r\n".encode()
    assert raw(address, head + b"3\r\nabc\r\nzz\r\n")[0].startswith(b"HTTP/1.1 400 ")
    said, _seconds = raw(address, head + b"3\r\nabc\r\n", b"zz\r\n", pause=0.2)
    assert said.startswith(b"HTTP/1.1 400 " if token else b"HTTP/1.1 401 ")
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []
    assert call(address, "/health")["alive"] is True
