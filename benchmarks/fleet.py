"""Every branch's specialist: our one command for all of them, against one process of another trainer per branch.

    python benchmarks/fleet.py --branches-dir DIR --peers peers.py [--branch NAME …] [--sample 10]
        [--tool trl:8:fp32] [--batch 8] [--precision fp32] [--together N] [--r 8 --targets q_proj,v_proj]
        [--python-for trl=PATH …]

Ours is ``sheily train`` with every branch (or those named), one epoch, as one process; then the same command once more
with nothing changed. ``peers.py TOOL`` is run on a sample of branches of all sizes; the seconds of a whole process are
taken to be a constant and a part per row, fitted to the sample by least squares, and added up over all branches.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from sheily_train import paths, runlog
from sheily_train.core.branches.catalog import find_branches
from sheily_train.core.training import bases
from sheily_train.core.training.hardware import fingerprint

MODEL = bases.EMBEDDED


def timed(words: list[str], home: str | None = None) -> tuple[float, str]:
    """Seconds and standard output of a whole process."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | ({"SHEILY_HOME": home} if home else {})
    begun = time.perf_counter()
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return time.perf_counter() - begun, done.stdout


def ours(arguments: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Train every branch in a folder that is thrown away, and ask for the same again."""
    with tempfile.TemporaryDirectory() as home:
        words = [sys.executable, "-m", "sheily_train", "train", "--lora", "--epochs", "1"]
        words += [word for name in names for word in ("--branch", name)]
        words += ["--batch-size", str(arguments.batch), "--lora-r", str(arguments.r)]
        words += ["--lora-targets", arguments.targets, "--lr", arguments.lr, "--precision", arguments.precision]
        words += ["--together", str(arguments.together), "--branches-dir", str(arguments.branches_dir)]
        seconds, told = timed(words, home)
        print(told)
        again, told = timed(words, home)
        print(told.splitlines()[-1])
        logs = sorted((Path(home) / "var" / "central_logs").glob("fleet_*.jsonl"))
        branches = list(runlog.read(logs[0], "fleet_branch"))
        states = {record["state"] for record in runlog.read(logs[-1], "fleet_branch")}
        metrics = [
            json.loads((Path(home) / "var" / "central_models" / name / paths.TRAINING_METRICS).read_text())
            for name in names
        ]
    return {
        "seconds": round(seconds, 1),
        "seconds_when_nothing_changed": round(again, 2),
        "states_when_nothing_changed": sorted(states),
        "peak_memory_mb": max(one["timing"]["peak_memory_mb"] for one in metrics),
        "tokens": sum(one["tokens"] for one in metrics),
        "branches": [
            {name: record[name] for name in ("branch", "state", "heldout_before", "heldout_after", "seconds", "error")}
            for record in branches
        ],
    }


def peer(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """One process of the other tool on one branch."""
    tool, batch, precision = arguments.tool.split(":")
    folder = arguments.branches_dir / name
    python = dict(pair.split("=", 1) for pair in arguments.python_for).get(tool, sys.executable)
    words = [python, str(arguments.peers), tool, "--model", bases.locate(MODEL), "--batch-size", batch]
    words += ["--train", str(folder / "training" / "data" / "train.jsonl")]
    words += ["--test", str(folder / "evaluation" / "data" / "test.jsonl")]
    words += ["--precision", precision, "--epochs", "1", "--lr", arguments.lr]
    words += ["--r", str(arguments.r), "--targets", arguments.targets]
    seconds, told = timed(words)
    return {"branch": name, "seconds": round(seconds, 1)} | json.loads(told.splitlines()[-1])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--branches-dir", type=Path, required=True)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--branch", action="append", metavar="NAME")
    parser.add_argument("--sample", type=int, default=10)
    parser.add_argument("--tool", default="trl:8:fp32", metavar="TOOL:BATCH:PRECISION")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--together", type=int, default=0)
    parser.add_argument("--lr", default="2e-4")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--targets", default="q_proj,v_proj")
    parser.add_argument("--python-for", action="append", default=[], metavar="TOOL=PATH")
    arguments = parser.parse_args()
    branches = find_branches(arguments.branches_dir)
    sizes = {
        branch.name: sum(path.read_bytes().count(b"\n") for path in branch.training_files)
        for branch in branches
        if not arguments.branch or branch.name in arguments.branch
    }
    names = sorted(sizes)
    mine = ours(arguments, names)
    by_size = sorted(names, key=lambda name: sizes[name])
    places = np.linspace(0, len(by_size) - 1, min(arguments.sample, len(by_size))).round().astype(int)
    rows = [peer(arguments, by_size[place]) for place in places]
    for row in rows:
        print(" · ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    slope, constant = np.polyfit([sizes[row["branch"]] for row in rows], [row["seconds"] for row in rows], 1)
    total = float(constant * len(names) + slope * sum(sizes.values()))
    print(
        f"nuestro: {mine['seconds']} s; {arguments.tool}: {total:.0f} s estimados; razón {total / mine['seconds']:.1f}"
    )
    print(f"otra vez, sin cambios: {mine['seconds_when_nothing_changed']} s")
    result = {
        "date": f"{date.today()}",
        "command": " ".join(["fleet.py", *(word.rpartition("/")[2] for word in sys.argv[1:])]),
        "machine": fingerprint("cpu"),
        "branches": len(names),
        "rows": sum(sizes.values()),
        "ours": mine,
        "peer": {
            "tool": arguments.tool,
            "sample": rows,
            "seconds_per_process": round(float(constant), 1),
            "seconds_per_row": round(float(slope), 4),
            "estimated_seconds": round(total, 1),
        },
        "ratio": round(total / mine["seconds"], 2),
    }
    path = Path(__file__).parent / f"{date.today()}-fleet.json"
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
