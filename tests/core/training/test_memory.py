"""The memory that is stated before the start, against what a real process then holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sheily_train import paths, runlog

BRANCHES = Path(__file__).parents[3] / "all-Branches"


@pytest.mark.usefixtures("embedded_base")
@pytest.mark.parametrize("names", [("physics",), ("physics", "law")], ids=["alone", "side by side"])
def test_the_stated_memory_is_near_the_measured(home: Path, names: tuple[str, ...]) -> None:
    """A process of its own trains the embedded base for a step: its peak is within 15 % of what was said."""
    for name in names:
        for part, rows in ((paths.TRAINING_DATA, 4), (paths.EVALUATION_DATA, 1)):
            [file] = (BRANCHES / name / part).glob("*.jsonl")
            folder = home / "all-Branches" / name / part
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "rows.jsonl").write_text("\n".join(file.read_text().splitlines()[:rows]) + "\n")
            (folder / "train.jsonl").unlink(missing_ok=True)
            (folder / "test.jsonl").unlink(missing_ok=True)
    command = [sys.executable, "-m", "sheily_train", "train", "--lora", "--epochs", "1", "--quiet", "--together", "2"]
    command += [word for name in names for word in ("--branch", name)]
    subprocess.run(command, check=True, env=os.environ | {"SHEILY_HOME": str(home)}, capture_output=True)
    for name in names:
        [log] = (home / "var" / "central_logs").glob(f"training_{name}_*.jsonl")
        [start], [done] = runlog.read(log, "start"), runlog.read(log, "done")
        assert start["memory_bytes"] / 2**20 == pytest.approx(done["timing"]["peak_memory_mb"], rel=0.15)
