"""`sheily doctor` and ./verificar_setup_colab.sh: what is printed, the exit code, and a launcher that always speaks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sheily_train.cli.doctor import doctor
from sheily_train.colab import doctor as examination
from sheily_train.colab.findings import Check, State

ROOT = Path(__file__).parents[2]
LAUNCHER = "verificar_setup_colab.sh"
DOCTOR = [
    sys.executable,
    "-c",
    "from sheily_train.cli import run; from sheily_train.cli.doctor import doctor; run(doctor)",
]
GOOD = Check("Python", State.OK, "3.11")
TIGHT = Check("Memoria", State.WARNING, "0.6 GB libres", "Cierra otros programas.")
BAD = Check("Trabajador", State.BAD, "pide «algo»…", "Haz esto.")


def given(monkeypatch: pytest.MonkeyPatch, *checks: Check, words: tuple[str, ...] = ()) -> tuple[int, str]:
    """The exit code and the output when these are the findings."""
    monkeypatch.setattr(examination, "examine", lambda *_arguments, **_options: iter(checks))
    result = CliRunner().invoke(doctor, [*words], standalone_mode=False)
    return int(result.return_value), result.output


def test_findings_are_aligned_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mark, a name, what was found, the mend below; a warning is no failure."""
    code, output = given(monkeypatch, GOOD, TIGHT)
    assert code == 0
    assert output.splitlines() == [
        "✓ Python      3.11",
        "! Memoria     0.6 GB libres",
        "              → Cierra otros programas.",
        "1 bien, 1 con aviso, 0 mal.",
    ]


def test_something_bad_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else is good."""
    code, output = given(monkeypatch, BAD, GOOD)
    assert code == 1
    assert output.startswith("✗ Trabajador  pide «algo»…\n              → Haz esto.\n✓ Python")


def test_json_for_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every check with its four fields, and one word for all of them."""
    code, output = given(monkeypatch, GOOD, BAD, words=("--json",))
    assert code == 1
    assert json.loads(output) == {
        "ok": False,
        "checks": [
            {"name": "Python", "state": "ok", "found": "3.11", "mend": ""},
            {"name": "Trabajador", "state": "mal", "found": "pide «algo»…", "mend": "Haz esto."},
        ],
    }


def process(*words: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*DOCTOR, *words], capture_output=True, timeout=60, env=os.environ | environment)


def test_a_terminal_without_accents(home: Path) -> None:
    """ASCII marks and bare letters, and no crash; a bad token is not shown there either."""
    done = process("http://127.0.0.1:1/#token=muy-secreto-muy-secreto", PYTHONIOENCODING="ascii")
    assert done.returncode == 1, done.stderr
    lines = done.stdout.decode("ascii").splitlines()
    assert any(line.startswith("+ Python") for line in lines)
    assert any(line.startswith("x Trabajador") for line in lines)
    assert any(line.strip().startswith("-> Arranca el trabajador") for line in lines)
    assert b"muy-secreto" not in done.stdout + done.stderr


def test_the_start_is_light(home: Path) -> None:
    """Neither the help nor a whole examination loads torch or a plotting library."""
    code = DOCTOR[2].replace(
        "run(doctor)", "import sys, atexit; atexit.register(lambda: print(*sys.modules)); run(doctor)"
    )
    for words, without in (("--help", {"torch", "numpy", "httpx2", "psutil"}), ("--json", {"torch", "numpy"})):
        done = subprocess.run([sys.executable, "-c", code, words], capture_output=True, text=True, timeout=60)
        assert done.stderr == ""
        assert not without & set(done.stdout.splitlines()[-1].split())


posix = pytest.mark.skipif(os.name == "nt", reason="the launcher is a POSIX shell's")


def copied(root: Path) -> Path:
    """A checkout of the test's own, without .venv."""
    root.mkdir()
    shutil.copy2(ROOT / LAUNCHER, root)
    shutil.copy(ROOT / "pyproject.toml", root)
    shutil.copytree(ROOT / "sheily_train", root / "sheily_train", ignore=shutil.ignore_patterns("__pycache__"))
    return root


def launch(root: Path, folder: Path, path: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {"HOME": str(folder), "PATH": path, "LC_ALL": "C.UTF-8", "SHEILY_HOME": str(root)}
    command: list[Any] = [shutil.which("bash"), root / LAUNCHER, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def tools(folder: Path, **programs: str) -> str:
    """A PATH with what the launcher itself needs, and these scripts."""
    folder.mkdir()
    for name in ("dirname", "readlink"):
        (folder / name).symlink_to(str(shutil.which(name)))
    for name, script in programs.items():
        (folder / name).write_text(f"#!{shutil.which('sh')}\n{script}\n")
        (folder / name).chmod(0o755)
    return str(folder)


@posix
def test_the_launcher_runs_the_doctor_from_any_folder(tmp_path: Path) -> None:
    """With the checkout's own .venv, arguments and exit code passed on; it is executable as it is shipped."""
    assert os.access(ROOT / LAUNCHER, os.X_OK)
    root = copied(tmp_path / "checkout")
    venv.create(root / ".venv", symlinks=True)
    [site] = (root / ".venv").glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    done = launch(root, tmp_path, "/usr/bin:/bin", "--json")
    assert done.returncode == 1, done.stderr
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert str(root / ".venv") in found["Python"]["found"]
    assert found["Paquetes"]["state"] == "ok"
    assert f"git -C {root} checkout" in found["Archivos"]["mend"]
    (tmp_path / LAUNCHER).symlink_to(root / LAUNCHER)  # as one puts it into ~/bin
    linked = launch(tmp_path, tmp_path, "/usr/bin:/bin", "--json")
    assert {check["name"]: check for check in json.loads(linked.stdout)["checks"]}["Python"] == found["Python"]


@posix
def test_without_python_the_launcher_says_how_to_get_it(tmp_path: Path) -> None:
    """One line, before any Python runs."""
    done = launch(copied(tmp_path / "checkout"), tmp_path, tools(tmp_path / "bin"))
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("Error: no hay Python. Instala Python 3.11 o posterior")


@posix
def test_an_old_python_is_named(tmp_path: Path) -> None:
    """Its version and where it is, and what to do. (A stand-in: the machine has no such Python.)"""
    old = 'case "$1" in --version) echo Python 3.9.2;; *) exit 1;; esac'
    done = launch(copied(tmp_path / "checkout"), tmp_path, tools(tmp_path / "bin", python3=old))
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith(f"Error: Python 3.9.2 ({tmp_path / 'bin' / 'python3'}) no sirve")


@posix
def test_without_packages_the_launcher_names_make_install(tmp_path: Path) -> None:
    """A Python that has nothing of ours: one line."""
    root = copied(tmp_path / "checkout")
    venv.create(tmp_path / "plain", symlinks=True)
    done = launch(root, tmp_path, f"{tmp_path / 'plain' / 'bin'}:/usr/bin:/bin")
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "faltan los paquetes de Sheily Train" in line
    assert line.endswith(f"make -C '{root}' install")
