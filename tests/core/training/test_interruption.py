"""Nothing is lost: real processes are killed, stopped and starved of disk, and the same command goes on."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sheily_train import paths, runlog
from sheily_train.core.training import checkpoint
from tests.conftest import make_home

COMMAND = (sys.executable, "-m", "sheily_train", "train", "--branch", "physics", "--lora")
EPOCHS, STEPS = 50, 150
"""Enough for ten kills, each of which lets a few steps pass."""
SETTINGS = (
    "--epochs",
    str(EPOCHS),
    "--batch-size",
    "4",
    "--lora-dropout",
    "0.1",
    "--early-stopping",
    "1000",
    "--save-steps",
    "2",
)


FORKS = """if True:
    import os, sys
    import peft, transformers
    from sheily_train.cli import run, sheily
    from sheily_train.core.training import fleet
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            run(sheily, sys.argv[1:])
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs the command anew for each line that it is sent, in a process forked from one that has loaded what it needs."""


def environment(home: Path) -> dict[str, str]:
    return os.environ | {"SHEILY_HOME": str(home), "OMP_NUM_THREADS": "1"}


def start(home: Path, model: Path, *more: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "--model", str(model), *SETTINGS, *more],
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


def work(home: Path) -> Path:
    return paths.work_dir(home / "var" / "central_models" / "physics")


def being_written(home: Path) -> list[int]:
    """Which checkpoint is half-written, by the time of its folder; a kill leaves the folder until the next one."""
    with contextlib.suppress(FileNotFoundError):
        return [path.stat().st_ctime_ns for path in work(home).glob(f"*/checkpoints/{checkpoint.UNFINISHED}")]
    return []


def steps_logged(home: Path) -> int:
    logs = list((home / "var" / "central_logs").glob("*.jsonl"))
    return sum(line.startswith(b'{"event": "step"') for log in logs for line in log.read_bytes().splitlines())


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        if process.poll() is not None:
            return
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def finish(process: subprocess.Popen[str]) -> str:
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    return out


Outcome = tuple[bytes, list[str], dict[str, object]]


def outcome(home: Path) -> Outcome:
    """What must be equal bit for bit: weights, step log, metrics (but for what the clock said)."""
    folder = home / "var" / "central_models" / "physics"
    metrics = json.loads((folder / paths.TRAINING_METRICS).read_text())
    del metrics["timing"]
    config = json.loads((folder / paths.TRAINING_CONFIG).read_text())
    return (folder / paths.ADAPTER_WEIGHTS).read_bytes(), runlog.deterministic_lines(Path(config["log"])), metrics


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Outcome:
    """What a run leaves that nobody disturbs."""
    root = make_home(tmp_path_factory.mktemp("quiet"))
    finish(start(root, tiny_llama))
    return outcome(root)


def test_ten_kills_change_no_bit(home: Path, quiet: Outcome, tiny_llama: Path) -> None:
    """Ten kill -9, half of them while a checkpoint is being written, leave the weights and log of a quiet run."""
    chance = random.Random(20)
    command = [sys.executable, "-c", FORKS, *COMMAND[3:], "--model", str(tiny_llama), *SETTINGS]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment(home), stdin=pipe, stdout=pipe, text=True) as forks:
        assert forks.stdin is not None
        assert forks.stdout is not None
        for number in range(10):
            left, before = being_written(home), steps_logged(home)
            print(file=forks.stdin, flush=True)
            pid = int(forks.stdout.readline())
            if number % 2:
                wait_until(forks, lambda left=left: being_written(home) not in ([], left))  # type: ignore[misc]
            else:
                wait_until(forks, lambda before=before: steps_logged(home) != before)  # type: ignore[misc]
                time.sleep(chance.uniform(0, 0.1))
            os.kill(pid, signal.SIGKILL)
            assert int(forks.stdout.readline()) == -signal.SIGKILL, "the run ended before it could be killed"
        forks.communicate()
    finish(start(home, tiny_llama))

    weights, lines, metrics = outcome(home)
    expected_weights, expected_lines, expected_metrics = quiet
    assert weights == expected_weights
    assert lines == expected_lines
    assert metrics == expected_metrics
    assert len([line for line in lines if '"step"' in line and "lr" in line]) == STEPS
    assert not list(work(home).glob("*/run.json"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(home: Path, quiet: Outcome, tiny_llama: Path, number: int) -> None:
    """Ctrl-C and SIGTERM end with one line that tells the step, and the same command goes on from that step."""
    process = start(home, tiny_llama)
    wait_until(process, lambda: steps_logged(home) > 3)
    process.send_signal(number)
    _out, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in error
    assert error.count("\n") == 1
    assert "todo está guardado" in error
    assert "Repite la misma orden" in error
    step = int(error.split("paso ")[1].split()[0])

    again = finish(start(home, tiny_llama))
    assert f"Sigue desde el paso {step} de {STEPS}" in again
    assert outcome(home) == quiet


def test_a_second_run_is_told_who_holds_the_branch(home: Path, quiet: Outcome, tiny_llama: Path) -> None:
    """While one process trains a branch, another gets its number, machine and start, and touches nothing."""
    first = start(home, tiny_llama)
    wait_until(first, lambda: steps_logged(home) > 3)
    first.send_signal(signal.SIGSTOP)  # it would end before the other has begun
    second = start(home, tiny_llama)
    _out, error = second.communicate(timeout=60)
    assert second.returncode == 6
    assert f"proceso {first.pid} en " in error
    assert "Traceback" not in error
    first.send_signal(signal.SIGCONT)
    finish(first)
    assert outcome(home) == quiet


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(home: Path, quiet: Outcome, tiny_llama: Path) -> None:
    """When a file cannot be written to its end, one line says so, and with room again the run ends as a quiet one."""
    first = start(home, tiny_llama)
    wait_until(first, lambda: len(list(work(home).glob("*/checkpoints/step-*"))) > 0)
    first.kill()
    first.communicate()

    saved = sorted(work(home).glob("*/checkpoints/step-*"))
    sizes = [file.stat().st_size for folder in saved for file in folder.glob("*.safetensors")]
    limit = min(sizes) // 2

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # its data file would not fit either
        process = start(home, tiny_llama, preexec_fn=small_disk)
    _out, error = process.communicate(timeout=60)
    assert process.returncode == 5, error
    assert "El disco está lleno" in error
    assert error.count("\n") == 1
    assert sorted(work(home).glob("*/checkpoints/step-*")) == saved
    assert not being_written(home)

    finish(start(home, tiny_llama))
    assert outcome(home) == quiet
