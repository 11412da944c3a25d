"""The memory that is stated before the start, against what a real process then holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sheily_train import runlog

BRANCHES = Path(__file__).parents[3] / "all-Branches"


@pytest.mark.usefixtures("embedded_base")
def test_the_stated_memory_is_near_the_measured(home: Path) -> None:
    """A process of its own trains the embedded base for a step: its peak is within 15 % of what was said."""
    command = [sys.executable, "-m", "sheily_train", "train", "--branch", "physics", "--lora", "--max-steps", "1"]
    command += ["--branches-dir", str(BRANCHES), "--quiet"]
    environment = os.environ | {"SHEILY_HOME": str(home)}
    environment.pop("COVERAGE_PROCESS_CONFIG", None)  # what measures coverage takes memory of its own
    subprocess.run(command, check=True, env=environment, capture_output=True)
    [log] = (home / "var" / "central_logs").glob("training_physics_*.jsonl")
    [start], [done] = runlog.read(log, "start"), runlog.read(log, "done")
    assert start["memory_bytes"] / 2**20 == pytest.approx(done["timing"]["peak_memory_mb"], rel=0.15)
