from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sheily_train.scripts.testing.faults import Campaign
from sheily_train.scripts.testing.scenario import POINTS, STRIKES, draw
from sheily_train.scripts.testing.workload import WORKLOADS, Workload
from tests.scripts.testing.sabotage import a_moment_is_not_loaded, no_duplicate_check

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the campaign is for Linux")

RUNS = 20
PLAIN = """if True:
    import hashlib, json, sys
    from dataclasses import replace
    import torch
    from sheily_train.colab.batches import make_feedback
    from sheily_train.colab.protocol import Kind
    from sheily_train.scripts.testing.counted_learner import CountedLearner, narrow_the_network
    from sheily_train.scripts.testing.workload import SEED, WORKLOADS
    torch.set_num_threads(1)
    narrow_the_network()
    [workload] = [each for each in WORKLOADS if each.name == sys.argv[1]]
    learner, lessons = CountedLearner(SEED), []
    for seq in range(1, workload.events + 1):
        if workload.kind(seq) is Kind.TRAIN:
            lesson = learner.train(replace(workload.batches(seq, seq), epochs=workload.epochs), seq)
            lessons.append({"dendrites": lesson.dendrites, "loss": lesson.loss})
        else:
            since = workload.feedback_every - 1
            learner.feedback(make_feedback(*workload.feedback(lessons[-min(since, 3):])), seq)
    state = learner.state()
    print(json.dumps({name: hashlib.sha256(state[name].numpy().tobytes()).hexdigest() for name in state}))
"""


def test_twenty_runs_under_faults_end_with_the_same_bits(tmp_path: Path) -> None:
    """Twenty runs, each struck at least ten times by kills, stops, damage, full disks and a bad network, end with the
    tensors, answers and counts of runs that nothing disturbed, and leave nothing behind."""
    file = tmp_path / "faults.json"
    words = [sys.executable, "-m", "sheily_train.scripts.testing.faults", "--runs", str(RUNS), "--seed", "1"]
    done = subprocess.run([*words, "--jobs", "2", "--json", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads(file.read_text())
    assert (result["runs"], result["failures"]) == (RUNS, [])
    assert result["fewest_faults_in_a_run"] >= 10
    assert sum(kind.startswith("kill") for kind in result["faults_by_kind"]) >= 15
    assert all(kind in done.stdout for kind in result["faults_by_kind"])


@pytest.mark.parametrize("prepare", [None, no_duplicate_check, a_moment_is_not_loaded])
def test_a_defect_of_the_worker_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prepare: Callable[[], None] | None
) -> None:
    """A worker that applies again what is sent again, or that loads a state not wholly, fails a run in which much is
    sent twice, and its seed is told; a sound worker passes it."""
    drawn = draw(1)
    stages = tuple(replace(stage, spoilt=dict.fromkeys(range(6), "twice")) for stage in drawn.stages)
    [report] = Campaign([replace(drawn, stages=stages)], tmp_path, prepare=prepare).run()
    assert bool(report.reason) == (prepare is not None)
    assert (f"Semilla {report.seed}: " in capsys.readouterr().err) == (prepare is not None)


@pytest.mark.parametrize("workload", WORKLOADS[::3], ids=lambda workload: workload.name)
def test_an_undisturbed_run_is_the_learner_alone(tmp_path: Path, workload: Workload) -> None:
    """What a run comes to between two processes is, bit for bit, what the learner comes to in one without any."""
    ending = Campaign([], tmp_path).undisturbed(workload)
    done = subprocess.run([sys.executable, "-c", PLAIN, workload.name], capture_output=True, text=True, check=True)
    assert ending.tensors == json.loads(done.stdout)
    assert ending.applied == list(range(1, workload.events + 1))


def test_a_seed_draws_the_same_and_every_kind_comes() -> None:
    """A seed repeats its run; a campaign of three hundred strikes in every way and at every commit point."""
    drawn = [draw(seed) for seed in range(1, 301)]
    assert drawn == [draw(seed) for seed in range(1, 301)]
    stages = [stage for scenario in drawn for stage in scenario.stages]
    assert {stage.strike for stage in stages} == set(STRIKES)
    assert {stage.point for stage in stages} >= {point for points in POINTS.values() for point in points}
    assert min(len(scenario.stages) for scenario in drawn) >= 10
