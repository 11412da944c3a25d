"""LoRA fine-tuning of one branch, ours against other trainers, in turn in one run, and against the machine's products.

    python benchmarks/lora_speed.py --branches-dir DIR --peers peers.py [--branch physics] [--max-steps N]
        [--tool seed:4:fp32 --tool peft:16:fp32 --tool trl:8:fp32 …] [--ours ours:32:fp32 …]
        [--r 8 --targets q_proj,v_proj] [--python-for trl=PATH …]

``peers.py TOOL`` trains the same rows with another tool and prints one JSON line; a tool that needs packages of its own
gets a Python of its own. A side is named tool:batch:precision. Every side trains the same adapter at the same learning
rate with a linear schedule, and is judged on every held-out row. With ``--max-steps`` only rates are measured.

The limit is the time that the step's matrix products alone would take, each measured at its own shape: forward and,
through the frozen weights, backward, for every token that rows hold, the head for the answer tokens. A step that
computes a common beginning once can go beyond it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from sheily_train import runlog
from sheily_train.core.branches.catalog import find_branch
from sheily_train.core.branches.examples import read_examples
from sheily_train.core.training import bases, data
from sheily_train.core.training.hardware import fingerprint

MODEL = bases.EMBEDDED
_TOKENS = 704
"""Rows of the measured products: about a batch of 16 short rows."""

_WARM_UP = 3
"""Steps at the start that are left out of a rate, as in peers.py."""


def run(words: list[str], home: str | None = None) -> str:
    """A command's standard output; its errors go to the screen."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | ({"SHEILY_HOME": home} if home else {})
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def ours(arguments: argparse.Namespace, batch: int, precision: str) -> dict[str, Any]:
    """Train with this project in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "sheily_train", "train", "--branch", arguments.branch, "--lora", "--epochs", "1"]
        words += ["--batch-size", str(batch), "--lora-r", str(arguments.r), "--lora-targets", arguments.targets]
        words += ["--lr", arguments.lr, "--schedule", "linear", "--precision", precision, "--json"]
        words += ["--max-steps", str(arguments.max_steps), "--branches-dir", str(arguments.branches_dir)]
        [result] = json.loads(run([*words, "--output", f"{folder}/model"], folder))
        rate = steady_rate(Path(result["log"]))
        metrics = result["metrics"]
    return {
        "tool": "sheily-train",
        "batch_size": batch,
        "precision": metrics["precision"],
        "examples_per_second": round(rate, 2),
        "training_seconds": metrics["timing"]["seconds"],
        "peak_memory_mb": metrics["timing"]["peak_memory_mb"],
        "heldout_before": metrics["heldout_before"]["loss"],
        "heldout_after": metrics["heldout_after"]["loss"],
    }


def steady_rate(log: Path) -> float:
    """Examples a second over the steps after the first ones."""
    timings = [record for record in runlog.read(log, "timing") if record["step"] >= _WARM_UP]
    first, last = timings[0], timings[-1]
    steps = [step for step in runlog.read(log, "step") if first["step"] < step["step"] <= last["step"]]
    return float(sum(step["examples"] for step in steps) / (last["seconds"] - first["seconds"]))


def peer(arguments: argparse.Namespace, tool: str, batch: int, precision: str) -> dict[str, Any]:
    """Train with another tool."""
    branch = arguments.branches_dir / arguments.branch
    pythons = dict(pair.split("=", 1) for pair in arguments.python_for)
    words = [pythons.get(tool, sys.executable), str(arguments.peers), tool, "--model", bases.locate(MODEL)]
    words += ["--train", str(branch / "training" / "data" / "train.jsonl")]
    words += ["--test", str(branch / "evaluation" / "data" / "test.jsonl"), "--test-rows", "100000"]
    words += ["--batch-size", str(batch), "--precision", precision, "--epochs", "1", "--lr", arguments.lr]
    words += ["--max-steps", str(arguments.max_steps or -1), "--r", str(arguments.r), "--targets", arguments.targets]
    row = json.loads(run(words).splitlines()[-1])
    return {
        "tool": tool,
        "batch_size": batch,
        "precision": precision,
        "examples_per_second": row["examples_per_s"],
        "training_seconds": row["train_wall_s"],
        "peak_memory_mb": row["peak_rss_mb"],
        "heldout_before": row["heldout_loss_before"],
        "heldout_after": row["heldout_loss_after"],
    }


def best_seconds(work: Callable[[], Any], rounds: int = 9) -> float:
    """The least of several measurements, after a first one that is not counted."""
    work()
    found = []
    for _round in range(rounds):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return min(found)


def product_limit(arguments: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Tokens and examples a second if a step were nothing but its matrix products."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = bases.load_model(MODEL, dtype=dtype, device="cpu", attention="eager")
    branch = find_branch(arguments.branches_dir, arguments.branch)
    rows = data.tokenize(
        read_examples(branch.training_files), bases.load_tokenizer(MODEL), template="sheily", max_length=1024
    )
    tokens, answers = sum(len(row.ids) for row in rows), sum(row.answer_tokens for row in rows)
    shapes: dict[tuple[int, int], float] = {}
    layers = [layer.weight for layer in model.modules() if type(layer) is torch.nn.Linear]
    head = model.get_output_embeddings().weight
    seconds = flops = 0.0
    for weight in layers:
        rows_in, share = (_TOKENS // 4, answers / tokens) if weight is head else (_TOKENS, 1.0)
        shape = (weight.shape[0], weight.shape[1])
        if shape not in shapes:
            x, dy = torch.randn(rows_in, shape[1], dtype=dtype), torch.randn(rows_in, shape[0], dtype=dtype)
            forward = best_seconds(lambda x=x, weight=weight: x @ weight.T)
            shapes[shape] = (forward + best_seconds(lambda dy=dy, weight=weight: dy @ weight)) / rows_in
        seconds += shapes[shape] * share
        flops += 4 * weight.numel() * share
    return {
        "precision": precision,
        "gflop_per_second": round(flops / seconds / 1e9, 1),
        "tokens_per_second": round(1 / seconds, 1),
        "examples_per_second": round(len(rows) / tokens / seconds, 2),
    }


def side(text: str) -> tuple[str, int, str]:
    """``tool:batch:precision``."""
    tool, batch, precision = text.split(":")
    return tool, int(batch), precision


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--branches-dir", type=Path, required=True)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--branch", default="physics")
    parser.add_argument("--tool", type=side, action="append", metavar="TOOL:BATCH:PRECISION")
    parser.add_argument("--ours", type=side, action="append", metavar="ours:BATCH:PRECISION")
    parser.add_argument("--python-for", action="append", default=[], metavar="TOOL=PATH")
    parser.add_argument("--lr", default="2e-4")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--targets", default="q_proj,v_proj")
    parser.add_argument("--max-steps", type=int, default=0)
    parser.add_argument(
        "--rounds", type=int, default=1, help="how often every side is measured, in turn; the best counts"
    )
    parser.add_argument("--name", default="lora-speed", help="of the result, after its date")
    arguments = parser.parse_args()
    rows = []
    for _round in range(arguments.rounds):
        sides = [("ours", *rest) for _ours, *rest in arguments.ours or [("ours", 32, "fp32")]]
        for tool, batch, precision in [*sides, *(arguments.tool or [("peft", 32, "fp32")])]:
            measure = ours if tool == "ours" else functools.partial(peer, tool=tool)
            rows.append(measure(arguments, batch=batch, precision=precision))
            print(" · ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    mine = max((row for row in rows if row["tool"] == "sheily-train"), key=lambda row: row["examples_per_second"])
    ratios = {}
    for tool in sorted({row["tool"] for row in rows} - {"sheily-train"}):
        best = max(row["examples_per_second"] for row in rows if row["tool"] == tool)
        ratios[tool] = round(mine["examples_per_second"] / best, 2)
    limit = product_limit(arguments, mine["precision"])
    ratios["limit"] = round(mine["examples_per_second"] / limit["examples_per_second"], 2)
    print("límite de los productos: " + " · ".join(f"{name} {value}" for name, value in limit.items()))
    print("razones: " + " · ".join(f"{name} {value}" for name, value in ratios.items()))
    result = {
        "date": f"{date.today()}",
        "command": " ".join(["lora_speed.py", *(word.rpartition("/")[2] for word in sys.argv[1:])]),
        "machine": fingerprint("cpu"),
        "rows": rows,
        "limit": limit,
        "ratios": ratios,
    }
    path = Path(__file__).parent / f"{date.today()}-{arguments.name}.json"
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
