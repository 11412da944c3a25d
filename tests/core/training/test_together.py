"""Branches side by side over one base: each is the specialist that is trained alone, and none costs another its run."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sheily_train import paths, runlog
from sheily_train.core.training import fleet, grouping
from sheily_train.core.training.identity import identify
from sheily_train.core.training.preparation import prepare
from sheily_train.core.training.request import TrainRequest
from sheily_train.core.training.run import Run, hold
from sheily_train.core.training.shared_base import SharedBase
from sheily_train.core.training.trainer import train_model, train_together
from sheily_train.errors import BusyError, Interrupted, TrainingError
from tests.conftest import MUSIC, PHYSICS
from tests.forks import Forks, Process, wait_until

BRANCHES = ("art", "law", "music", "physics")
ROWS = {"art": 6, "law": 12, "music": 12, "physics": 9}
"""So that one branch ends first and two end together."""


@pytest.fixture
def home(home: Path) -> Path:
    """A project root with four branches of different sizes."""
    for branch, rows in ROWS.items():
        for part, chosen in ((paths.TRAINING_DATA, slice(rows)), (paths.EVALUATION_DATA, slice(12, 16))):
            folder = home / "all-Branches" / branch / part
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("*.jsonl"):
                old.unlink()
            pairs = (MUSIC if branch in {"art", "music"} else PHYSICS)[chosen]
            lines = [json.dumps({"prompt": f"{branch}: {ask}", "completion": answer}) for ask, answer in pairs]
            (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return home


@pytest.fixture
def requests(home: Path, tiny_llama: Path) -> list[TrainRequest]:
    """One for each branch, four of them side by side."""
    settings = {"model": str(tiny_llama), "lora": True, "epochs": 4, "batch_size": 3, "lr": 1e-2, "together": 4}
    settings |= {"precision": "fp32", "warmup_steps": 2, "early_stopping": 100}
    return [TrainRequest(branch=branch, **settings) for branch in BRANCHES]  # type: ignore[arg-type]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / paths.ADAPTER_WEIGHTS)


def numbers(log: Path) -> list[tuple[int, float]]:
    """Every step's and judgement's loss."""
    return [(record["step"], record["loss"]) for record in runlog.read(log) if record["event"] in {"step", "eval"}]


def bits(folder: Path) -> tuple[bytes, list[str]]:
    log = Path(json.loads((folder / paths.TRAINING_CONFIG).read_text())["log"])
    log = log if log.exists() else folder.parent.parent / "logs" / log.name
    return (folder / paths.ADAPTER_WEIGHTS).read_bytes(), runlog.deterministic_lines(log)


def test_each_specialist_equals_the_one_trained_alone(requests: list[TrainRequest], tmp_path: Path) -> None:
    """Four branches of three lengths: losses, clipped norms, schedules, judged epochs, final weights and files."""
    outcomes = {outcome.branch: outcome for outcome in fleet.train_branches(requests)}
    assert {outcome.state for outcome in outcomes.values()} == {"trained"}
    for request in requests:
        alone = train_model(replace(request, together=1, output=tmp_path / request.branch))
        together = outcomes[request.branch].result
        assert together is not None
        assert [step for step, _loss in numbers(together.log)] == [step for step, _loss in numbers(alone.log)]
        for (_step, ours), (_same, theirs) in zip(numbers(together.log), numbers(alone.log), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        for ours, theirs in zip(runlog.read(together.log, "step"), runlog.read(alone.log, "step"), strict=True):
            assert (ours["lr"], ours["tokens"]) == (theirs["lr"], theirs["tokens"])
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        expected = weights(alone.folder)
        assert weights(together.folder).keys() == expected.keys()
        for name, tensor in weights(together.folder).items():
            assert (tensor - expected[name]).norm() <= 1e-4 * expected[name].norm(), name
        configs = [(folder / paths.ADAPTER_CONFIG).read_bytes() for folder in (together.folder, alone.folder)]
        assert configs[0] == configs[1]


def test_they_share_their_passes(requests: list[TrainRequest], monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of every branch that still goes pass at once; the time is told as parts that add up."""
    from sheily_train.core.training.forward import PackedForward

    seen: list[int] = []
    losses = PackedForward.losses

    def counted(forward: PackedForward, groups: Sequence[Any], names: Sequence[str] = ("default",)) -> torch.Tensor:
        if torch.is_grad_enabled() and not next(forward._decoder.parameters()).is_meta:
            seen.append(len(groups))
        return losses(forward, groups, names)

    monkeypatch.setattr(PackedForward, "losses", counted)
    began = time.monotonic()
    outcomes = list(fleet.train_branches(requests))
    seconds = time.monotonic() - began
    assert seen == [4] * 8 + [3] * 4 + [2] * 4
    assert 0 < sum(outcome.result.metrics["timing"]["seconds"] for outcome in outcomes if outcome.result) <= seconds
    assert sum(outcome.seconds for outcome in outcomes) <= seconds


def test_a_group_goes_on_by_another_path(
    requests: list[TrainRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of models given relative and then absolute holds the same group, in the same order."""
    monkeypatch.chdir(tmp_path)
    near = [replace(request, output=Path("models") / request.branch) for request in requests]
    [begun] = grouping.plan(near, fresh=False, shared=SharedBase())
    for request in near:
        Run(request.model_folder, identify(request).key).begin(request.branch, {}, {})
    far = [replace(request, output=request.model_folder.absolute()) for request in near]
    [group] = grouping.plan(far, fresh=False, shared=SharedBase())
    assert [request.branch for request in group] == [request.branch for request in begun]


ARGUMENTS = ("train", "--all", "--lora", "--epochs", "12", "--batch-size", "3", "--precision", "fp32")
SETTINGS = ("--together", "4", "--save-steps", "3", "--early-stopping", "1000")


def steps_logged(logs: Path) -> int:
    lines = [line for log in logs.glob("training_*.jsonl") for line in log.read_bytes().splitlines()]
    return sum(line.startswith(b'{"event": "step"') for line in lines)


def test_killed_side_by_side_they_go_on_to_the_same_bits(
    home: Path, tiny_llama: Path, tmp_path: Path, forks: Forks
) -> None:
    """Kills at several places, one after a branch has ended, and a SIGTERM: each one's weights and log are the same."""
    models, logs = home / "var" / "central_models", home / "var" / "central_logs"

    def start(*more: str) -> Process:
        return forks.start(*ARGUMENTS, *SETTINGS, "--model", str(tiny_llama), *more)

    def start_and_wait(condition: Callable[[int], bool]) -> Process:
        process, before = start(), steps_logged(logs)
        wait_until(lambda: condition(steps_logged(logs) - before))
        return process

    start("--output", str(tmp_path / "quiet")).finish()
    logs.rename(tmp_path / "logs")
    # All four take up to 24 steps, three up to 36, two up to 48; some are taken again after a kill.
    start_and_wait(lambda steps: steps >= 9).kill()
    start_and_wait(lambda steps: steps >= 22).kill()
    start_and_wait(lambda _: (models / "art" / paths.TRAINING_CONFIG).is_file()).kill()
    start_and_wait(lambda steps: steps >= 6).kill()
    assert not (models / "law" / paths.TRAINING_CONFIG).exists()
    stopped = start_and_wait(lambda steps: steps >= 1)
    stopped.send(signal.SIGTERM)
    assert stopped.wait() == 128 + signal.SIGTERM
    assert "todo está guardado" in stopped.error.read_text()
    assert start().finish().splitlines()[-1] == "4 de 4 ramas listas."
    for branch in BRANCHES:
        assert bits(models / branch) == bits(tmp_path / "quiet" / branch), branch
    assert not list(models.glob(".*.work/*/*.json"))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """From its fifth step on the music branch has weights that are no numbers."""
    from sheily_train.core.training.trainee import Trainee

    rows = Trainee.rows

    def poison(trainee: Trainee) -> Any:
        if trainee.job.branch.name == "music" and trainee.progress.step == 5:
            with torch.no_grad():
                next(iter(trainee.engine.parameters.values())).fill_(float("nan"))
        return rows(trainee)

    monkeypatch.setattr(Trainee, "rows", poison)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("first", ["music", "art"])
def test_a_branch_whose_numbers_are_none_leaves_the_others(
    requests: list[TrainRequest], tmp_path: Path, first: str
) -> None:
    """Wherever it stands in the batch, it fails by itself; the others end as if it had never been there."""
    requests = sorted(requests, key=lambda request: request.branch != first)
    ended = dict(train_together(requests))
    by_branch = {request.branch: outcome for request, outcome in ended.items()}
    assert isinstance(by_branch["music"], TrainingError)
    for request in requests:
        if request.branch != "music":
            alone = train_model(replace(request, output=tmp_path / request.branch))
            expected, actual = weights(alone.folder), weights(request.model_folder)
            for name, tensor in actual.items():
                assert (tensor - expected[name]).norm() <= 1e-4 * expected[name].norm(), name
    music = next(request for request in requests if request.branch == "music")
    assert Run(music.model_folder, identify(music).key).group == []


def test_a_branch_that_another_process_holds_is_told_and_the_others_are_trained(requests: list[TrainRequest]) -> None:
    """Of four one is busy; three are ready in the end."""
    with hold(requests[1].model_folder, "law"):
        outcomes = {outcome.branch: outcome for outcome in fleet.train_branches(requests)}
    assert isinstance(outcomes["law"].error, BusyError)
    assert [branch for branch, outcome in outcomes.items() if outcome.state == "trained"] == ["art", "physics", "music"]


def test_a_branch_that_went_on_alone_costs_the_others_nothing(requests: list[TrainRequest]) -> None:
    """Cut off side by side, one of them trained to a later step by itself: each goes on from where it is."""

    def stop_at(step: int, branch: str) -> Any:
        def listen(record: runlog.Record) -> None:
            if (record["event"], record["branch"]) == ("step", branch) and record["step"] == step:
                os.kill(os.getpid(), signal.SIGINT)

        return listen

    requests = [replace(request, save_steps=1) for request in requests]
    with pytest.raises(Interrupted):
        list(train_together(requests, listeners=(stop_at(3, "law"),)))
    with pytest.raises(Interrupted):
        train_model(requests[2], listeners=(stop_at(7, "music"),))
    told: list[tuple[str, int]] = []

    def note(record: runlog.Record) -> None:
        if record["event"] == "resume":
            told.append((record["branch"], record["step"]))

    ended = dict(train_together(requests, listeners=(note,)))
    assert told == [("art", 3), ("law", 3), ("music", 7), ("physics", 3)]
    assert not any(isinstance(outcome, Exception) for outcome in ended.values())


def plan(requests: list[TrainRequest], **options: Any) -> list[list[str]]:
    groups = grouping.plan(requests, **{"fresh": False, "shared": SharedBase()} | options)
    return [[request.branch for request in group] for group in groups]


def test_the_plan_puts_alike_lengths_together_and_is_kept(requests: list[TrainRequest]) -> None:
    """Longest first; a later call finds the groups written down, whatever it would measure now."""
    requests = [replace(request, together=2) for request in requests]
    assert plan(requests) == [["physics", "art"], ["law", "music"]]
    assert plan([replace(request, together=0) for request in requests]) == [["physics", "art"], ["law", "music"]]
    assert plan([replace(request, together=3) for request in requests]) == [["art"], ["law", "music", "physics"]]


def test_what_is_measured_decides(requests: list[TrainRequest], monkeypatch: pytest.MonkeyPatch) -> None:
    """Together when that takes at most 95 % of the time, and only when there is work enough to be worth the measure."""
    requests = [replace(request, together=0, epochs=100) for request in requests]
    seconds = iter([1.0, 0.9, 1.0, 0.9, 1.0, 0.99, 1.0, 0.99])
    monkeypatch.setattr(grouping, "_seconds", lambda _engines, _passes: next(seconds))
    few = [replace(request, epochs=1) for request in requests]
    assert plan(few) == [["art"], ["law"], ["music"], ["physics"]]
    assert plan(requests) == [["law", "music", "physics", "art"]]
    for request in requests:
        Run(request.model_folder, identify(request).key).discard()
    assert plan(requests) == [["art"], ["law"], ["music"], ["physics"]]
    assert next(seconds, None) is None


def test_measuring_takes_real_time_and_leaves_the_base_as_it_was(requests: list[TrainRequest]) -> None:
    """The kept base has no adapter, no gradient, and a branch trained on it has the bits of one trained without."""
    shared = SharedBase()
    jobs = [prepare(request) for request in requests]
    assert grouping._is_faster(jobs, shared) in {True, False}
    base: Any = shared._model
    assert not any("lora" in name or p.requires_grad or p.grad is not None for name, p in base.named_parameters())
    first = train_model(requests[0], shared=shared)
    again = bits(first.folder)
    train_model(requests[0], fresh=True)
    assert bits(first.folder) == again
    assert first.metrics["steps"] == 8


@pytest.mark.parametrize("change", [{"lora_dropout": 0.1}, {"lora": False}], ids=["dropout", "all weights"])
def test_what_cannot_share_a_pass_goes_alone(requests: list[TrainRequest], change: dict[str, Any]) -> None:
    """Asked to go side by side, branches with dropout, or without adapters, are trained just the same, alone."""
    requests = [replace(request, **change, epochs=1) for request in requests[:2]]
    outcomes = list(fleet.train_branches(requests))
    assert [outcome.state for outcome in outcomes] == ["trained", "trained"]
    assert not any(prepare(request).takes_several for request in requests)
