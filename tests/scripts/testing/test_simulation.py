from __future__ import annotations

import asyncio
import json
from pathlib import Path
from random import Random

import pytest
from click.testing import CliRunner

from sheily_train.colab.worker import WorkerSettings
from sheily_train.scripts.testing import mutants, simulated_world
from sheily_train.scripts.testing.forgetful_disk import ForgetfulDisk
from sheily_train.scripts.testing.simulated_network import FAULTS
from sheily_train.scripts.testing.simulated_worker import SimulatedWorker
from sheily_train.scripts.testing.simulation import command, simulate, simulate_all
from sheily_train.scripts.testing.virtual_time import VirtualLoop

TROUBLES = 18


def test_five_hundred_histories_keep_the_promise(tmp_path: Path) -> None:
    """Whatever went wrong, in each of 500 histories every event was applied once, in order, to the right weights."""
    file = tmp_path / "result.json"
    result = CliRunner().invoke(command, ["--runs", "500", "--jobs", "2", "--json", str(file)])
    assert result.exit_code == 0, result.output
    told = json.loads(file.read_text())
    assert (told["runs"], told["failed"]) == (500, [])
    assert set(FAULTS) < set(told["troubles"]), "a fault of the network never happened"
    assert len(told["troubles"]) == len(FAULTS) + TROUBLES, "a trouble of the machines never happened"
    assert sum(told["troubles"].values()) > 2500


@pytest.mark.parametrize("seed", [4452, 5335, 9746, 17295])
def test_histories_that_once_failed_keep_the_promise(seed: int) -> None:
    """A state asked of a worker that came back older; a break whose own state was damaged afterwards."""
    assert simulate(seed).failure == ""


def test_a_dead_worker_can_be_stopped(tmp_path: Path) -> None:
    """Stopping a worker that died with work in both its queues ends at once, and does none of it."""
    done: list[str] = []

    async def stop() -> None:
        disk = ForgetfulDisk(tmp_path / "disk", Random(0))
        settings = WorkerSettings(disk.root / "state", "a-token-of-the-tests-0123456789")
        worker = SimulatedWorker(disk, settings, Random(0), 0)
        inner = worker._app._worker
        inner._thread.submit(lambda: done.append("learned"))
        inner._writer.submit(done.append, "written")
        disk.crash(power=False)
        worker.stop()

    with asyncio.Runner(loop_factory=lambda: VirtualLoop(Random(0))) as runner:
        runner.run(stop())
    assert done == []


def test_a_seed_gives_the_same_history_again() -> None:
    """Every request, its time and its answer follow from the seed, here and in another process."""
    seeds = range(40, 46)
    here = [simulate(seed) for seed in seeds]
    again = [simulate(seed) for seed in reversed(seeds)][::-1]
    elsewhere = list(simulate_all(seeds, jobs=2))
    assert here == again == elsewhere
    assert len({report.history for report in here}) == len(seeds)


def test_a_broken_promise_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another outcome was expected, the seed and the reason are printed and the command ends with 1."""
    monkeypatch.setattr(simulated_world, "_essence", lambda _answer: {})
    result = CliRunner().invoke(command, ["--runs", "9", "--seed", "3", "--until-failure"])
    assert result.exit_code == 1
    assert "semilla 3: Broken: desk: other answers" in result.output
    assert "semilla 4" not in result.output
    assert "1 historias" not in result.output.splitlines()[0]


@pytest.mark.parametrize(
    "mutant", [mutant for mutant in mutants.MUTANTS if mutant.judge == "simulation"], ids=lambda mutant: mutant.name
)
def test_a_missing_safeguard_is_noticed(mutant: mutants.Mutant) -> None:
    """The simulation fails on a copy of the package in which the safeguard is taken out."""
    well, text = mutants.verdict(mutant, {"simulation": 600}, jobs=1)
    assert well, text


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_each_mutant_differs_from_the_package_in_its_safeguard(mutant: mutants.Mutant, tmp_path: Path) -> None:
    """Every mutant can be made of today's code, and is code that compiles."""
    package = mutants.copy_of_the_package(tmp_path)
    mutants.mutate(package, mutant)
    text = (package / mutant.file).read_text()
    assert text != (mutants.PACKAGE / mutant.file).read_text()
    compile(text, mutant.file, "exec")


def test_what_is_not_there_cannot_be_taken_out(tmp_path: Path) -> None:
    """A safeguard that moved is told, so that no mutant is the unchanged code."""
    package = mutants.copy_of_the_package(tmp_path)
    with pytest.raises(ValueError, match="chain: 0 times in durable"):
        mutants.mutate(package, mutants.Mutant("chain", "durable.py", "not there", ""))
