from __future__ import annotations

import json
import os
import queue
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

SHEILY_WORKER = [
    sys.executable,
    "-c",
    "from sheily_train.cli import run; from sheily_train.cli.worker import worker; run(worker, prog='sheily worker')",
]


def _hear_hang_ups() -> None:
    """Undo what nohup leaves to its children: a worker rightly lets an ignored hang-up be."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Process:
    """A real ``sheily worker``, and what it has said so far."""

    def __init__(self, folder: Path, *flags: str, **environment: str) -> None:
        command = [*SHEILY_WORKER, "--port", "0", "--state-dir", str(folder), "--device", "cpu", *flags]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
            preexec_fn=_hear_hang_ups,
        )
        self.said = ""
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self._lines.put(line)
        self._lines.put("")

    def address(self) -> str:
        """The address, once the whole text with it was shown."""
        self.wait_for("guarda y sale")
        return re.findall(r"^(https?://\S+)$", self.said, re.MULTILINE)[-1]

    def wait_for(self, words: str) -> None:
        """Read on until something was said."""
        while words not in self.said:
            line = self._lines.get(timeout=60)
            assert line, f"it ended: {self.process.communicate()[1]}"
            self.said += line

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Send a signal and wait; returns the exit code and what went to stderr."""
        self.process.send_signal(number)
        code = self.process.wait(60)
        while line := self._lines.get(timeout=10):
            self.said += line
        assert self.process.stderr is not None
        return code, self.process.stderr.read()

    def close(self) -> None:
        """End it for certain."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Process]]:
    monkeypatch.delenv("SHEILY_WORKER_TOKEN", raising=False)
    running: list[Process] = []

    def begin(*flags: str, **environment: str) -> Process:
        running.append(Process(tmp_path / "state", *flags, **environment))
        return running[-1]

    yield begin
    for process in running:
        process.close()


def refuse(*flags: str, **environment: str) -> tuple[int, str]:
    """A worker that does not start: its exit code and its one line."""
    done = subprocess.run(
        [*SHEILY_WORKER, *flags], capture_output=True, text=True, timeout=240, env=os.environ | environment
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_ends_in_good_order(
    start: Callable[..., Process], tmp_path: Path, number: signal.Signals
) -> None:
    """Ctrl-C and a closed terminal: exit 0, a snapshot, no complaint."""
    worker = start()
    call(worker.address(), "/train_layer2", SAMPLE)
    assert worker.end(number) == (0, "")
    assert "Guardado en" in worker.said
    assert list((tmp_path / "state" / "runs").glob("*/*/state.safetensors"))


def test_sigterm_while_a_batch_is_learned_loses_nothing(start: Callable[..., Process]) -> None:
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


def test_a_killed_worker_leaves_no_lock(start: Callable[..., Process]) -> None:
    """After SIGKILL the same command starts again, under the same token."""
    first = start()
    address = first.address()
    assert first.end(signal.SIGKILL)[0] == -signal.SIGKILL
    assert start().address().partition("#")[2] == address.partition("#")[2]


def test_a_second_worker_is_refused(start: Callable[..., Process], tmp_path: Path) -> None:
    """On the first one's folder or port: one line, exit code 6, and a way out of the port; the first goes on."""
    first = start()
    address = first.address()
    port = address.partition("#")[0].rpartition(":")[2]
    for flags, words in (
        (("--port", "0", "--state-dir", str(tmp_path / "state")), str(tmp_path / "state")),
        (("--port", port, "--state-dir", str(tmp_path / "other")), port),
    ):
        code, said = refuse(*flags)
        assert code == 6
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
GIVE_EACH = """
import contextlib, io, json, sys
from sheily_train.cli import run
from sheily_train.cli.worker import worker

def give(words):
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            run(worker, words, prog="sheily worker")
        except SystemExit as end:
            return end.code, out.getvalue(), error.getvalue()

print(json.dumps([give(words) for words in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], tuple[int, str, str]]:
    """How each of these flags ends a start, all given in one process: exit code, stdout, stderr."""
    folder = str(tmp_path_factory.mktemp("refused") / "state")
    given = json.dumps([("--state-dir", folder, *flags) for flags in UNUSABLE])
    command = [sys.executable, "-c", GIVE_EACH, given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    return dict(zip(UNUSABLE, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("flags", UNUSABLE)
def test_flags_that_cannot_be_used(
    flags: tuple[str, ...], refusals: dict[tuple[str, ...], tuple[int, str, str]]
) -> None:
    """Exit code 2 and a reason; the token is not repeated."""
    code, out, said = refusals[flags]
    assert (code, out) == (2, "")
    assert "Error:" in said
    assert "Traceback" not in said
    assert "short" not in said


def test_the_token_of_the_environment_holds(start: Callable[..., Process]) -> None:
    """``SHEILY_WORKER_TOKEN`` is the token; ``--token`` goes before it."""
    worker = start(SHEILY_WORKER_TOKEN="e" * 40)
    assert worker.address().endswith("#token=" + "e" * 40)
    worker.end(signal.SIGTERM)
    assert start("--token", "g" * 40, SHEILY_WORKER_TOKEN="e" * 40).address().endswith("#token=" + "g" * 40)


def test_requests_leave_no_trace_of_a_token(start: Callable[..., Process], tmp_path: Path) -> None:
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


def test_a_tunnel_ends_with_its_worker(
    start: Callable[..., Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGINT to the worker alone: the tunnel's program, in a session of its own, is ended by it."""
    note = put_on_path("cloudflared", CLOUDFLARED, tmp_path / "bin", monkeypatch)
    worker = start("--tunnel", "cloudflared")
    assert worker.address().startswith("https://four-dashed-words-1.trycloudflare.com#token=")
    assert len(started(note)) == 1
    assert worker.end(signal.SIGINT)[0] == 0
    assert started(note) == []


def test_a_signal_before_it_answers_leaves_nothing(
    start: Callable[..., Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
