"""The example, started as a person starts it, at a real worker."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from sheily_train import runlog
from sheily_train.colab.ejemplo_integracion_completa import CHECKOUT
from sheily_train.colab.journal import Journal
from sheily_train.errors import BusyError
from tests.colab.test_connect import TOKEN, Worker

SCRIPT = CHECKOUT / "sheily_train" / "colab" / "ejemplo_integracion_completa.py"


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A worker that answers."""
    worker = Worker(tmp_path_factory.mktemp("worker"))
    worker.start()
    yield worker
    worker.stop()


def example(folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Start the script in a folder that is its project."""
    environment = {**os.environ, "SHEILY_HOME": str(folder), **more}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_thirteen_steps_end_with_a_report_and_go_on_the_next_time(worker: Worker, tmp_path: Path) -> None:
    """By argument, then by COLAB_SERVER_URL: the second call adds to the first one's events and log; one that cannot
    begin takes nothing away."""
    url = f"{worker.address.url}/#token={TOKEN}"
    done = example(tmp_path, url)
    assert (done.returncode, done.stderr) == (0, "")
    headings = re.findall(r"^ ?(\d+)\. \w", done.stdout, re.MULTILINE)
    assert headings == [str(number) for number in range(1, 14)]
    assert "con 0 eventos aplicados" in done.stdout
    assert "diagnostico_ok" in done.stdout
    assert "8 lotes; loss" in done.stdout
    assert done.stdout.endswith("✅ Ejemplo completo\n")
    assert TOKEN not in done.stdout

    log = tmp_path / "var" / "central_logs" / "omega_ejemplo.jsonl"
    assert len(list(runlog.read(log, "step"))) == 9
    assert [record["seq"] for record in runlog.read(log, "feedback")] == [10]
    for suffix in (".html", ".json", ".md"):
        assert str(log.with_suffix(suffix)) in done.stdout
    summary = json.loads(log.with_suffix(".json").read_text(encoding="utf-8"))["summary"]
    assert (summary["finished"], summary["vectors"]) == (True, 9 * 64)

    told = log.read_bytes()
    with Journal(tmp_path / "var" / "omega" / "ejemplo", "ejemplo"):
        assert example(tmp_path, url).returncode == BusyError.exit_code
    assert log.read_bytes() == told

    done = example(tmp_path, COLAB_SERVER_URL=url)
    assert (done.returncode, done.stderr) == (0, "")
    assert log.read_bytes().startswith(told)
    assert "con 10 eventos aplicados" in done.stdout
    assert "20 respuestas en el historial" in done.stdout


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    """Without an address, and with the guide's."""
    done = example(tmp_path, COLAB_SERVER_URL="")
    assert done.returncode == 2
    assert done.stderr.startswith("Error: Falta la dirección")
    done = example(tmp_path, "https://tu-url.ngrok-free.app")
    assert done.returncode == 2
    assert "dirección del ejemplo" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="a plain python3 of POSIX")
def test_a_python_without_the_packages_is_told(tmp_path: Path) -> None:
    """In a checkout without .venv."""
    venv.create(tmp_path / "plain", symlinks=True)
    copy = tmp_path / "sheily_train" / "colab" / SCRIPT.name
    copy.parent.mkdir(parents=True)
    copy.write_bytes(SCRIPT.read_bytes())
    done = subprocess.run([str(tmp_path / "plain/bin/python"), str(copy)], env={}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: faltan los paquetes")
