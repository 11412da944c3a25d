from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.colab.test_serve import SAMPLE, call
from tests.colab.test_tunnels import CLOUDFLARED, put_on_path, started
from tests.forks import Forks, Process, wait_until


class Worker:
    """A real ``sheily worker`` in a process of its own."""

    def __init__(self, process: Process) -> None:
        self._process, self._running = process, True

    @property
    def said(self) -> str:
        """What went to stdout so far."""
        return self._process.out.read_text(encoding="utf-8")

    def address(self) -> str:
        """The address, once the whole text with it was shown."""
        wait_until(lambda: "guarda y sale" in self.said or self._complained(), every=0.02)
        return re.findall(r"^(https?://\S+)$", self.said, re.MULTILINE)[-1]

    def _complained(self) -> bool:
        error = self._process.error.read_text(encoding="utf-8")
        assert not error
        return False

    def end(self, number: signal.Signals | None = None) -> tuple[int, str]:
        """Send a signal, if it does not end by itself, and wait: the exit code and what went to stderr."""
        if number is not None:
            self._process.send(number)
        code = self._process.wait()
        self._running = False
        return code, self._process.error.read_text(encoding="utf-8")

    def close(self) -> None:
        """End it for certain."""
        if self._running:
            self.end(signal.SIGKILL)


Start = Callable[..., Worker]


@pytest.fixture
def start(forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.delenv("SHEILY_WORKER_TOKEN", raising=False)
    running: list[Worker] = []

    def begin(*flags: str, **environment: str) -> Worker:
        words = ("worker", "--port", "0", "--state-dir", str(tmp_path / "state"), "--device", "cpu", *flags)
        running.append(Worker(forks.start(*words, **environment)))
        return running[-1]

    yield begin
    for worker in running:
        worker.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_ends_in_good_order(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C and a closed terminal: exit 0, a snapshot, no complaint."""
    worker = start()
    call(worker.address(), "/train_layer2", SAMPLE)
    assert worker.end(number) == (0, "")
    assert "Guardado en" in worker.said
    assert list((tmp_path / "state" / "runs").glob("*/*/state.safetensors"))


def test_sigterm_while_a_batch_is_learned_loses_nothing(start: Start) -> None:
    """The answer in hand arrives, and the next start goes on from it, under the same token."""
    first = start()
    address = first.address()
    call(address, "/train_layer2", SAMPLE)
    answers: list[Any] = []
    long = {"samples": SAMPLE["samples"] * 64, "epochs": 10}
    thread = threading.Thread(target=lambda: answers.append(call(address, "/train_layer2", long)))
    thread.start()
    time.sleep(0.4)
    ended = first.end(signal.SIGTERM)
    thread.join()
    assert ended == (0, "")
    assert [answer["status"] for answer in answers] == ["trained"]
    second = start().address()
    assert second.partition("#")[2] == address.partition("#")[2]
    call(second, "/train_layer2", SAMPLE)
    assert call(second, "/status")["estadisticas"]["total_batches"] == 3


def test_a_killed_worker_leaves_no_lock(start: Start) -> None:
    """After SIGKILL the same command starts again, under the same token."""
    first = start()
    address = first.address()
    assert first.end(signal.SIGKILL)[0] == -signal.SIGKILL
    assert start().address().partition("#")[2] == address.partition("#")[2]


def test_a_second_worker_is_refused(start: Start, tmp_path: Path) -> None:
    """On the first one's folder or port: one line, exit code 6, and a way out of the port; the first goes on."""
    first = start()
    address = first.address()
    port = address.partition("#")[0].rpartition(":")[2]
    for flags, words in (
        ((), str(tmp_path / "state")),
        (("--port", port, "--state-dir", str(tmp_path / "other")), port),
    ):
        refused = start(*flags)
        code, said = refused.end()
        assert (code, refused.said) == (6, "")
        assert said.count("\n") == 1
        assert words in said
    assert "--port" in said
    assert call(address, "/status")["status"] == "online"


UNUSABLE = (
    ("--token", "short"),
    ("--no-auth", "--host", "0.0.0.0"),
    ("--no-auth", "--tunnel", "cloudflared"),
    ("--no-auth", "--token", "x" * 30),
    ("--port", "70000"),
    ("--tunnel", "carrier-pigeon"),
    ("--device", "abacus"),
    ("--seed", "-1"),
)


@pytest.mark.parametrize("flags", UNUSABLE)
def test_flags_that_cannot_be_used(start: Start, flags: tuple[str, ...]) -> None:
    """Exit code 2 and a reason; the token is not repeated."""
    refused = start(*flags)
    code, said = refused.end()
    assert (code, refused.said) == (2, "")
    assert "Error:" in said
    assert "Traceback" not in said
    assert "short" not in said


def test_the_token_of_the_environment_holds(start: Start) -> None:
    """``SHEILY_WORKER_TOKEN`` is the token; ``--token`` goes before it."""
    worker = start(SHEILY_WORKER_TOKEN="e" * 40)
    assert worker.address().endswith("#token=" + "e" * 40)
    worker.end(signal.SIGTERM)
    assert start("--token", "g" * 40, SHEILY_WORKER_TOKEN="e" * 40).address().endswith("#token=" + "g" * 40)


def test_requests_leave_no_trace_of_a_token(start: Start, tmp_path: Path) -> None:
    """Right and wrong tokens, in headers and queries: nothing of them is logged; the file holds the only copy."""
    worker = start()
    address = worker.address()
    shown = worker.said
    url, _, token = address.partition("#token=")
    for wrong in ("w" * 43, "ñ" * 20):
        with pytest.raises(urllib.error.HTTPError) as caught:
            call(url, f"/status?token={token}", token=wrong.encode().decode("latin-1"))
        assert caught.value.code == 401
        caught.value.close()
    call(address, "/train_layer2", SAMPLE)
    code, complaints = worker.end(signal.SIGTERM)
    assert (code, complaints) == (0, "")
    assert token not in worker.said.removeprefix(shown)
    holders = [
        path.name
        for path in (tmp_path / "state").rglob("*")
        if path.is_file() and token in path.read_bytes().decode("latin-1")
    ]
    assert holders == ["token"]


def test_a_tunnel_ends_with_its_worker(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGINT to the worker alone: the tunnel's program, in a session of its own, is ended by it."""
    note = put_on_path("cloudflared", CLOUDFLARED, tmp_path / "bin", monkeypatch)
    worker = start("--tunnel", "cloudflared")
    assert worker.address().startswith("https://four-dashed-words-1.trycloudflare.com#token=")
    assert len(started(note)) == 1
    assert worker.end(signal.SIGINT)[0] == 0
    assert started(note) == []


def test_a_signal_before_it_answers_leaves_nothing(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM while a tunnel is awaited: exit 130, and the tunnel's program is ended."""
    note = put_on_path("cloudflared", CLOUDFLARED, tmp_path / "bin", monkeypatch)
    worker = start("--tunnel", "cloudflared", FAKE_MODE="mute")
    while not note.exists():
        time.sleep(0.05)
    code, complaints = worker.end(signal.SIGTERM)
    assert code == 130
    assert "Traceback" not in complaints
    assert started(note) == []


def test_the_help_loads_nothing_heavy() -> None:
    """Neither torch nor the web server."""
    code = (
        "import sys; from click.testing import CliRunner; from sheily_train.cli.worker import worker;"
        "result = CliRunner().invoke(worker, ['--help']);"
        "print(result.exit_code, '--no-auth' in result.output,"
        " *sorted({'torch', 'uvicorn', 'fastapi', 'limits'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "True"]
