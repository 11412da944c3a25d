"""Nothing is lost: real processes are killed, stopped and starved of disk, and the same command goes on."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from sheily_train import paths, runlog
from sheily_train.core.training import checkpoint
from tests.conftest import make_home
from tests.forks import Forks, Process, wait_until

COMMAND = ("train", "--branch", "physics", "--lora")
EPOCHS, STEPS = 36, 108
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


Start = Callable[..., Process]


@pytest.fixture
def start(forks: Forks, home: Path, tiny_llama: Path) -> Start:
    """Begins the command below ``home``, or goes on with it."""
    return partial(forks.start, *COMMAND, "--model", str(tiny_llama), *SETTINGS)


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
    """What a run leaves that nobody disturbs, in a process that is started from nothing."""
    root = make_home(tmp_path_factory.mktemp("quiet"))
    command = [sys.executable, "-m", "sheily_train", *COMMAND, "--model", str(tiny_llama), *SETTINGS]
    environment = os.environ | {"SHEILY_HOME": str(root), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return outcome(root)


def test_ten_kills_change_no_bit(home: Path, quiet: Outcome, start: Start) -> None:
    """Ten kill -9, half of them while a checkpoint is being written, leave the weights and log of a quiet run."""
    chance = random.Random(20)
    for number in range(10):
        left, before = being_written(home), steps_logged(home)
        process = start()
        if number % 2:
            wait_until(lambda left=left: being_written(home) not in ([], left))  # type: ignore[misc]
        else:
            wait_until(lambda before=before: steps_logged(home) != before)  # type: ignore[misc]
            time.sleep(chance.uniform(0, 0.1))
        process.kill()
    start().finish()

    weights, lines, metrics = outcome(home)
    expected_weights, expected_lines, expected_metrics = quiet
    assert weights == expected_weights
    assert lines == expected_lines
    assert metrics == expected_metrics
    assert len([line for line in lines if '"step"' in line and "lr" in line]) == STEPS
    assert not list(work(home).glob("*/run.json"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(home: Path, quiet: Outcome, start: Start, number: int) -> None:
    """Ctrl-C and SIGTERM are acknowledged and end with a line that tells the step, from which the command goes on."""
    process = start()
    wait_until(lambda: steps_logged(home) > 3)
    process.send(number)
    assert process.wait() == 128 + number
    error = process.error.read_text()
    assert "Traceback" not in error
    assert error.count("\n") == 2
    assert error.startswith("Se para tras este paso")
    assert "todo está guardado" in error
    assert "Repite la misma orden" in error
    step = int(error.split("paso ")[1].split()[0])

    assert f"Sigue desde el paso {step} de {STEPS}" in start().finish()
    assert outcome(home) == quiet


def test_a_second_run_is_told_who_holds_the_branch(home: Path, quiet: Outcome, start: Start) -> None:
    """While one process trains a branch, another gets its number, machine and start, and touches nothing."""
    first = start()
    wait_until(lambda: steps_logged(home) > 3)
    first.send(signal.SIGSTOP)  # it would end before the other has begun
    second = start()
    assert second.wait() == 6
    error = second.error.read_text()
    assert f"proceso {first.pid} en " in error
    assert "Traceback" not in error
    first.send(signal.SIGCONT)
    first.finish()
    assert outcome(home) == quiet


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(home: Path, quiet: Outcome, start: Start) -> None:
    """When a file cannot be written to its end, one line says so, and with room again the run ends as a quiet one."""
    first = start()
    wait_until(lambda: len(list(work(home).glob("*/checkpoints/step-*"))) > 0)
    first.kill()
    saved = sorted(work(home).glob("*/checkpoints/step-*"))
    sizes = [file.stat().st_size for folder in saved for file in folder.glob("*.safetensors")]

    starved = start(largest_file=min(sizes) // 2)
    assert starved.wait() == 5
    error = starved.error.read_text()
    assert "El disco está lleno" in error
    assert error.count("\n") == 1
    assert sorted(work(home).glob("*/checkpoints/step-*")) == saved
    assert not being_written(home)

    start().finish()
    assert outcome(home) == quiet
