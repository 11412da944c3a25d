"""One epoch of one branch, ours against another trainer, in turn in one run.

    python benchmarks/versus_peft.py --branches-dir DIR --peers peers.py [--branch physics] [--batch-size 32]

``peers.py`` trains the same rows with transformers and PEFT and prints one JSON line. Both sides use LoRA r=8 on q_proj
and v_proj, learning rate 2e-4, the same batch size, and are judged on every held-out row. The table is printed, and
written with machine and command to ``benchmarks/<date>-versus-peft.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from sheily_train.core.training import bases
from sheily_train.core.training.hardware import fingerprint

SETTINGS = ("--epochs", "1", "--lr", "2e-4")


def run(words: list[str]) -> str:
    """A command's standard output; its errors go to the screen."""
    return subprocess.run(
        words, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    ).stdout


def ours(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train with this project in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "sheily_train", "train", "--branch", arguments.branch, "--lora", *SETTINGS]
        words += ["--batch-size", str(arguments.batch_size), "--lora-targets", "q_proj,v_proj"]
        words += ["--schedule", "linear", "--json"]
        words += ["--branches-dir", str(arguments.branches_dir), "--output", f"{folder}/model"]
        os.environ["SHEILY_HOME"] = folder
        metrics = json.loads(run(words))[0]["metrics"]
    return {
        "tool": "sheily-train",
        "precision": metrics["precision"],
        "examples_per_second": metrics["timing"]["examples_per_second"],
        "training_seconds": metrics["timing"]["seconds"],
        "peak_memory_mb": metrics["timing"]["peak_memory_mb"],
        "heldout_before": metrics["heldout_before"]["loss"],
        "heldout_after": metrics["heldout_after"]["loss"],
    }


def peft(arguments: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Train with transformers and PEFT."""
    branch = arguments.branches_dir / arguments.branch
    words = [sys.executable, str(arguments.peers), "peft", "--model", bases.locate(bases.EMBEDDED), *SETTINGS]
    words += ["--train", str(branch / "training" / "data" / "train.jsonl")]
    words += ["--test", str(branch / "evaluation" / "data" / "test.jsonl"), "--test-rows", "100000"]
    words += ["--batch-size", str(arguments.batch_size), "--precision", precision]
    row = json.loads(run(words).splitlines()[-1])
    return {
        "tool": "transformers + PEFT",
        "precision": precision,
        "examples_per_second": row["examples_per_s"],
        "training_seconds": row["train_wall_s"],
        "peak_memory_mb": row["peak_rss_mb"],
        "heldout_before": row["heldout_loss_before"],
        "heldout_after": row["heldout_loss_after"],
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--branches-dir", type=Path, required=True)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--branch", default="physics")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    rows = []
    for _round in range(arguments.rounds):
        for measure in (ours, lambda a: peft(a, "bf16"), lambda a: peft(a, "fp32")):
            row = measure(arguments)
            rows.append(row)
            print(" · ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    command = (
        f"versus_peft.py --branches-dir {arguments.branches_dir.name} --branch {arguments.branch} "
        f"--batch-size {arguments.batch_size} --rounds {arguments.rounds}"
    )
    result = {"date": f"{date.today()}", "command": command, "machine": fingerprint("cpu"), "rows": rows}
    path = Path(__file__).parent / f"{date.today()}-versus-peft.json"
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
