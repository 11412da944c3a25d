"""Time to quality: seconds of training until held-out loss is what the best peer has at the end of its epoch.

    python benchmarks/quality.py --branches-dir DIR --peers peers.py --branch NAME [--branch NAME …]
        [--tool peft:8:fp32:1e-3 …] [--ours 4:auto:cosine …] [--share 1 --share 0.5 …]
        [--r 8 --targets q_proj,v_proj] [--python-for trl=PATH …]

``peers.py TOOL`` trains one epoch at every tool:batch:precision:rate; the one with the least held-out loss sets the
mark and the seconds to beat. Every one of ours (batch:rate:schedule) trains the same adapter for shorter and shorter
shares of an epoch, each a run with a schedule of its own, until one misses the mark. The rate ``auto`` is the default.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from argparse import Namespace
from datetime import date
from pathlib import Path
from typing import Any

from lora_speed import peer, run

from sheily_train.core.training.hardware import fingerprint

_PEERS = [f"peft:{batch}:fp32:{rate}" for rate in ("1e-3", "2e-4") for batch in (4, 8, 16, 32)]
_SHARES = (1.0, 0.5, 0.35, 0.25, 0.18, 0.12)


def ours(arguments: Namespace, branch: str, setting: str, share: float) -> dict[str, Any]:
    """Train for a share of an epoch in a folder that is thrown away."""
    batch, rate, schedule = setting.split(":")
    rates = [] if rate == "auto" else ["--lr", rate]
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "sheily_train", "train", "--branch", branch, "--lora", "--epochs", str(share)]
        words += ["--batch-size", batch, *rates, "--schedule", schedule]
        words += ["--lora-r", str(arguments.r), "--lora-targets", arguments.targets, "--json"]
        words += ["--branches-dir", str(arguments.branches_dir), "--output", f"{folder}/model"]
        [result] = json.loads(run(words, folder))
    metrics = result["metrics"]
    return {
        "branch": branch,
        "setting": setting,
        "share": share,
        "steps": metrics["steps"],
        "training_seconds": metrics["timing"]["seconds"],
        "heldout_after": round(metrics["heldout_after"]["loss"], 4),
    }


def measure(arguments: Namespace, branch: str) -> dict[str, Any]:
    """Every peer, then every one of ours, on one branch."""
    peers = []
    for setting in arguments.tool or _PEERS:
        tool, batch, precision, rate = setting.split(":")
        row = peer(Namespace(**vars(arguments) | {"branch": branch, "lr": rate}), tool, int(batch), precision)
        peers.append({"setting": setting} | {name: row[name] for name in ("training_seconds", "heldout_after")})
        show({"branch": branch} | peers[-1])
    best = min(peers, key=lambda row: row["heldout_after"])
    tried: list[dict[str, Any]] = []
    for setting in arguments.ours or ["4:auto:cosine"]:
        for share in arguments.share or _SHARES:
            tried.append(ours(arguments, branch, setting, share))
            show(tried[-1])
            if tried[-1]["heldout_after"] > best["heldout_after"]:
                break
    ratios = {}
    for setting in dict.fromkeys(row["setting"] for row in tried):
        reached = [row for row in tried if row["setting"] == setting and row["heldout_after"] <= best["heldout_after"]]
        seconds = min((row["training_seconds"] for row in reached), default=None)
        ratios[setting] = round(best["training_seconds"] / seconds, 2) if seconds else None
    print(f"{branch}: {best} · {ratios}", flush=True)
    return {"branch": branch, "best_peer": best, "peers": peers, "ours": tried, "ratios": ratios}


def show(row: dict[str, Any]) -> None:
    """One line per run, as it ends."""
    print(" · ".join(f"{name} {value}" for name, value in row.items()), flush=True)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--branches-dir", type=Path, required=True)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--branch", action="append", required=True, metavar="NAME")
    parser.add_argument("--tool", action="append", metavar="TOOL:BATCH:PRECISION:RATE")
    parser.add_argument("--ours", action="append", metavar="BATCH:RATE:SCHEDULE")
    parser.add_argument("--share", action="append", type=float)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--targets", default="q_proj,v_proj")
    parser.add_argument("--python-for", action="append", default=[], metavar="TOOL=PATH")
    arguments = parser.parse_args()
    arguments.max_steps = 0
    result = {
        "date": f"{date.today()}",
        "command": " ".join(["quality.py", *(word.rpartition("/")[2] for word in sys.argv[1:])]),
        "machine": fingerprint("cpu"),
        "branches": [measure(arguments, branch) for branch in arguments.branch],
    }
    path = Path(__file__).parent / f"{date.today()}-quality-{'-'.join(arguments.branch)}.json"
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
