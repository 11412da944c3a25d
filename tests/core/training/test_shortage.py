"""Memory that runs out in a step: smaller micro-batches, the same result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sheily_train import paths, runlog
from sheily_train.core.training.request import TrainRequest
from sheily_train.core.training.trainer import train_model

_PROGRAM = """
import json, resource, sys
from pathlib import Path
import psutil, torch
from sheily_train.core.training.request import TrainRequest
from sheily_train.core.training.trainer import train_model

def tighten(record):
    if record["event"] == "eval" and record["step"] == 0:
        allowed = psutil.Process().memory_info().vms + int(sys.argv[2])
        resource.setrlimit(resource.RLIMIT_AS, (allowed, resource.RLIM_INFINITY))
    if record["event"] == "done":
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

torch.set_num_threads(1)
settings = json.loads(sys.argv[1])
train_model(TrainRequest(**settings | {"output": Path(settings["output"])}), listeners=(tighten,))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS bounds memory on Linux only")
def test_memory_that_runs_out_halves_the_micro_batch(home: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """Under a real limit of memory the run ends by itself, says what it did, and learns what it learns with room."""
    long = " ".join(["La energía de un cuerpo es la capacidad de hacer trabajo."] * 6)
    rows = [{"prompt": f"Pregunta {number}: {long}", "completion": f"{number}. {long}"} for number in range(32)]
    data = home / "all-Branches" / "physics" / "training" / "data" / "train.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    settings = {"branch": "physics", "model": str(tiny_llama), "lora": True, "epochs": 1, "batch_size": 32, "lr": 1e-2}
    settings |= {"micro_tokens": 100_000, "precision": "fp32", "max_length": 512}
    roomy = train_model(TrainRequest(**settings, output=tmp_path / "roomy"))

    command = [sys.executable, "-c", _PROGRAM, json.dumps(settings | {"output": str(tmp_path / "tight")}), "50000000"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"SHEILY_HOME": str(home)})
    assert done.returncode == 0, done.stderr
    [log] = set(paths.logs_dir().glob("training_*.jsonl")) - {roomy.log}
    notes = [record["text"] for record in runlog.read(log, "note")]
    assert any(note.startswith("Se acabó la memoria en el paso 1: se repite con ") for note in notes)
    ours, theirs = (load_file(tmp_path / name / paths.ADAPTER_WEIGHTS) for name in ("tight", "roomy"))
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
