from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sheily_train import paths
from sheily_train.core.training import checkpoint
from sheily_train.core.training.run import Run, StopSignal, hold
from sheily_train.errors import BusyError, RequestError

HOLDER = """
import sys, time
from pathlib import Path
from sheily_train.core.training.run import hold
with hold(Path(sys.argv[1]), "physics"):
    print("ready", flush=True)
    time.sleep(60)
"""
STOPPED = """
import signal, time
from sheily_train.core.training.run import StopSignal
before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
try:
    with StopSignal() as stop:
        print("ready", stop.requested, flush=True)
        while not stop.requested:
            time.sleep(0.01)
        print("asked", stop.received, flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    print("stopped", before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)))
"""


@contextlib.contextmanager
def process(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that has said its first line."""
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert line(running).startswith("ready")
            yield running
        finally:
            running.kill()


def line(running: subprocess.Popen[str]) -> str:
    assert running.stdout is not None
    return running.stdout.readline().strip()


def test_a_second_process_is_told_who_holds_the_branch(tmp_path: Path) -> None:
    """Process, host and since when; another output is free, and after kill -9 this one is too."""
    output = tmp_path / "physics"
    with process(HOLDER, str(output)) as holder:
        with (
            pytest.raises(BusyError, match=f"«physics».*proceso {holder.pid} en {socket.gethostname()}"),
            hold(output, "physics"),
        ):
            pass
        with hold(tmp_path / "music", "music"):
            pass
        holder.kill()
        holder.wait()
        with hold(output, "physics"):
            assert json.loads((paths.work_dir(output) / "holder.json").read_text())["pid"] == os.getpid()
    with hold(output, "physics"):
        pass


def test_a_branch_is_held_once_within_a_process_too(tmp_path: Path) -> None:
    """A failure inside sets it free; a holder that has not said its name yet is told as unknown."""
    output = tmp_path / "physics"
    with contextlib.suppress(ZeroDivisionError), hold(output, "physics"):
        (paths.work_dir(output) / "holder.json").unlink()
        with pytest.raises(BusyError, match=r"proceso \? en"), hold(output, "physics"):
            pass
        raise ZeroDivisionError
    with hold(output, "physics"):
        pass


def test_an_output_that_is_a_file_is_refused_before_any_work(tmp_path: Path) -> None:
    """Not when the model is trained and has to go there."""
    (tmp_path / "model").touch()
    with pytest.raises(RequestError, match="es un archivo"), hold(tmp_path / "model", "physics"):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_stops(number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM alike, mixed too; afterwards the handlers are those of before."""
    with process(STOPPED) as running:
        running.send_signal(number)
        assert line(running) == f"asked {number}"
        running.send_signal(signal.SIGTERM)
        assert line(running) == "stopped True"
        assert running.wait(timeout=30) == 0


def test_outside_the_main_thread_no_signal_is_touched() -> None:
    """A library user may train in a thread, where Python allows no handlers."""
    before, stops = signal.getsignal(signal.SIGINT), []

    def enter() -> None:
        with StopSignal() as stop:
            stops.append((stop.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert stops == [(False, before)]


def test_a_run_is_begun_once(home: Path) -> None:
    """A later sitting gets the record of the first, its log included, whatever the machine says by then."""
    run = Run(home / "models" / "physics", "key")
    assert not run.folder.exists()
    first = run.begin("physics", {"device": "cpu"}, {"threads": 2})
    assert run.begin("physics", {"device": "cuda"}, {"threads": 8}) == first == run.record
    assert (first["placement"], first["fingerprint"]) == ({"device": "cpu"}, {"threads": 2})
    log = Path(first["log"])
    assert log.parent == home / "var" / "central_logs"
    assert log.name.startswith("training_physics_")
    assert log.suffix == ".jsonl"
    assert log.is_file()


def test_runs_of_one_second_have_logs_of_their_own(home: Path) -> None:
    """No run writes into another's log."""
    logs = {Run(home / "out", f"key{number}").begin("physics", {}, {})["log"] for number in range(5)}
    assert len(logs) == 5


def test_a_run_knows_its_checkpoints_and_the_unfinished_others(home: Path) -> None:
    """Those of the same output with another key; a discarded run is forgotten, the others stay."""
    run, other, never = (Run(home / "out", key) for key in ("one", "two", "three"))
    for begun in (run, other):
        begun.begin("physics", {}, {})
    checkpoint.save(run.checkpoints, 4, {"x": torch.zeros(1)}, {})
    found, damaged = run.newest_checkpoint()
    assert found is not None
    assert (found.step, damaged) == (4, [])
    assert run.others() == [other.folder]
    assert never.others() == [run.folder, other.folder]
    run.discard()
    assert run.record is None
    assert run.newest_checkpoint() == (None, [])
    assert never.others() == [other.folder]
    never.discard()
