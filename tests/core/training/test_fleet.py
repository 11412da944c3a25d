from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sheily_train import paths, runlog
from sheily_train.core.training import bases, fleet
from sheily_train.core.training.hardware import inspect_machine
from sheily_train.core.training.request import TrainRequest
from sheily_train.core.training.shared_base import SharedBase
from sheily_train.core.training.trainee import Trainee
from sheily_train.core.training.trainer import train_model
from sheily_train.durable import sha256_file
from sheily_train.errors import DataError, Interrupted, ResourceError


@pytest.fixture
def requests(home: Path, tiny_llama: Path) -> list[TrainRequest]:
    """A request for each of the home's branches, with dropout, over one tiny base."""
    return [
        TrainRequest(branch=branch, model=str(tiny_llama), lora=True, epochs=2, lr=1e-2, lora_dropout=0.1)
        for branch in ("physics", "music")
    ]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the bases whose weights are read from now on."""
    read: list[str] = []
    load_model = bases.load_model

    def counted(name: str, **options: Any) -> Any:
        read.append(name)
        return load_model(name, **options)

    monkeypatch.setattr(bases, "load_model", counted)
    return read


def weights(branch: str, folder: Path | None = None) -> bytes:
    return ((folder or paths.models_dir()) / branch / paths.ADAPTER_WEIGHTS).read_bytes()


def test_branches_over_one_base_equal_those_trained_alone(
    requests: list[TrainRequest], loads: list[str], tmp_path: Path
) -> None:
    """The base is read once for all, and every specialist has the bytes that it has when trained by itself."""
    outcomes = list(fleet.train_branches(requests))
    assert [outcome.state for outcome in outcomes] == ["trained", "trained"]
    assert loads == [requests[0].model]
    for request in requests:
        train_model(replace(request, output=tmp_path / "alone" / request.branch))
        assert weights(request.branch) == weights(request.branch, tmp_path / "alone")
    assert len(loads) == 3


def test_a_second_fleet_reads_no_base_and_trains_nothing(requests: list[TrainRequest], loads: list[str]) -> None:
    """What is up to date is told so, from its log to its losses, without its rows or its base being read."""
    first = list(fleet.train_branches(requests))
    loads.clear()
    again = list(fleet.train_branches(requests))
    assert [outcome.state for outcome in again] == ["current", "current"]
    assert [outcome.result.metrics for outcome in again if outcome.result] == [
        outcome.result.metrics for outcome in first if outcome.result
    ]
    assert loads == []


def test_a_fleet_with_nothing_to_do_ends_at_once(requests: list[TrainRequest]) -> None:
    """The command that finds every branch up to date loads neither torch nor what else takes seconds."""
    words = ["sheily", "train", "--all", "--lora", "--max-steps", "1", "--model", requests[0].model]
    code = f"import sys\nfrom sheily_train.cli import run, sheily\nsys.argv = {words}\ntry:\n    run(sheily)\n"
    code += "finally:\n    print(sorted({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)))\n"
    loaded = []
    for _time in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-2] == "2 de 2 ramas listas."
        loaded.append(done.stdout.splitlines()[-1])
    assert loaded == ["['numpy', 'peft', 'torch', 'transformers']", "[]"]


def test_a_run_that_fails_takes_its_base_with_it(
    requests: list[TrainRequest], loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an unexpected error in the middle of a run the next branch loads the base anew, and is trained."""
    stepped = Trainee.stepped

    def fails_for_physics(trainee: Trainee, result: Any, examples: int, share: float) -> None:
        if trainee.job.branch.name == "physics":
            raise ZeroDivisionError
        stepped(trainee, result, examples, share)

    monkeypatch.setattr(Trainee, "stepped", fails_for_physics)
    outcomes = list(fleet.train_branches(requests))
    assert [outcome.state for outcome in outcomes] == ["failed", "trained"]
    assert isinstance(outcomes[0].error.__cause__ if outcomes[0].error else None, ZeroDivisionError)
    assert len(loads) == 2


def test_the_fleet_log_tells_how_each_branch_ended(requests: list[TrainRequest], home: Path) -> None:
    """One record per branch with state, losses, seconds, log and error, between a start and an end that counts."""
    (home / "all-Branches" / "physics" / paths.TRAINING_DATA / "train.jsonl").write_text("{\n", encoding="utf-8")
    log = fleet.new_log()
    outcomes = list(fleet.train_branches(requests, log=log))
    start, physics, music, done = runlog.read(log)
    assert start["branches"] == ["physics", "music"]
    assert (physics["branch"], physics["state"], physics["log"]) == ("physics", "failed", None)
    assert physics["error"] == str(outcomes[0].error)
    assert "train.jsonl:1" in physics["error"]
    assert (music["branch"], music["state"], music["error"]) == ("music", "trained", None)
    assert music["heldout_after"]["loss"] < music["heldout_before"]["loss"]
    assert Path(music["log"]).is_file()
    assert music["seconds"] > 0
    assert (done["failed"], done["trained"]) == (1, 1)


def test_a_base_of_another_kind_is_loaded_in_its_place() -> None:
    """Only a request of the same base, device and precision is lent the kept one; while lent, nothing is kept."""
    shared, made = SharedBase(), [object(), object()]
    supply = iter(made)
    load: Any = lambda: next(supply)  # noqa: E731
    assert shared.take(("a", "fp32"), load) is made[0]
    shared._model = made[0]  # type: ignore[assignment]
    assert shared.take(("a", "bf16"), load) is made[1]
    assert shared._model is None


def test_a_kept_base_counts_as_free_memory(requests: list[TrainRequest]) -> None:
    """The next run either takes it over or has it given up, so that its estimate is that of a run alone."""
    shared, machine = SharedBase(), inspect_machine()
    assert shared.free_in(machine) == machine
    train_model(replace(requests[0], precision="fp32"), shared=shared)
    size = (Path(requests[0].model) / paths.MODEL_WEIGHTS).stat().st_size
    assert size * 0.9 < shared.free_in(machine).memory_free - machine.memory_free < size * 1.5


def test_a_signal_while_a_branch_ends_stops_before_the_next(requests: list[TrainRequest]) -> None:
    """A SIGTERM that comes when no step is left to stop after lets that branch end and begins no other."""
    begun: list[str] = []

    def stop_at_the_end(record: runlog.Record) -> None:
        begun.append(record["branch"])
        if record["event"] == "eval" and record["step"] > 0:
            os.kill(os.getpid(), signal.SIGTERM)

    requests = [replace(request, together=1) for request in requests]
    with pytest.raises(Interrupted) as caught:
        list(fleet.train_branches(requests, listeners=(stop_at_the_end,)))
    assert caught.value.exit_code == 128 + signal.SIGTERM
    assert set(begun) == {"physics"}
    assert weights("physics")


def test_a_branch_that_cannot_be_read_leaves_the_others(
    requests: list[TrainRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that the system does not let us read fails its own branch, by name; the other one is trained."""

    def refused(path: Path) -> str:
        if "physics" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return sha256_file(path)

    monkeypatch.setattr("sheily_train.core.branches.catalog.sha256_file", refused)
    outcomes = {outcome.branch: outcome for outcome in fleet.train_branches(requests)}
    assert isinstance(outcomes["physics"].error, DataError)
    assert "train.jsonl" in str(outcomes["physics"].error)
    assert outcomes["music"].state == "trained"


def test_a_folder_that_cannot_be_written_leaves_the_others(requests: list[TrainRequest], tmp_path: Path) -> None:
    """A branch whose output lies where none can be made is told with the folder; the other one is trained."""
    (tmp_path / "file").touch()
    requests[0] = replace(requests[0], output=tmp_path / "file" / "physics")
    outcomes = {outcome.branch: outcome for outcome in fleet.train_branches(requests)}
    assert isinstance(outcomes["physics"].error, ResourceError)
    assert str(tmp_path / "file") in str(outcomes["physics"].error)
    assert outcomes["music"].state == "trained"
