"""make does what the README says, shown without doing it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def environment() -> dict[str, str]:
    """Ours, without what an outer make or a person's settings would change."""
    hidden = {"PYTHON", "TORCH", "BRANCH", "QUESTION"}
    return {name: value for name, value in os.environ.items() if name not in hidden and not name.startswith("MAKE")}


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A checkout in which nothing was installed yet."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def would_run(folder: Path, *words: str) -> list[list[str]]:
    """The commands that make would run, split into words."""
    done = subprocess.run(
        ["make", "-n", *words], cwd=folder, env=environment(), capture_output=True, text=True, check=True
    )
    return [shlex.split(line) for line in done.stdout.splitlines()]


def windows_steps(number: int) -> list[list[str]]:
    """The steps without make of the README's first (0: demo) or second (1: tests) block, in make's words."""
    code = re.findall(r"^```powershell\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)[number]
    lines = [line.replace("\\Scripts\\", "/bin/").replace("py -3 ", "python3 ") for line in code.splitlines()]
    return [shlex.split(line) for line in lines]


def steps(commands: list[list[str]]) -> list[list[str]]:
    """Make's commands without its own bookkeeping: the check of Python's version, stamps, pip's silence."""
    shown = [[word for word in words if word != "--quiet"] for words in commands]
    return [words for words in shown if words[0] != "touch" and "-c" not in words]


def test_help_lists_every_target(fresh: Path) -> None:
    """``make``, alone or with ``help``, has a line for every target."""
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert phony is not None
    for words in (["make"], ["make", "help"]):
        done = subprocess.run(words, cwd=fresh, env=environment(), capture_output=True, text=True, check=True)
        listed = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
        assert listed.keys() == set(phony[1].split())
        assert all(listed.values())


def test_demo_is_what_the_readme_shows_step_by_step(fresh: Path) -> None:
    """On a fresh machine ``make demo`` runs the very steps that the README gives to people without make."""
    assert steps(would_run(fresh, "demo")) == windows_steps(0)


def test_test_installs_and_runs_everything(fresh: Path) -> None:
    """``make test`` goes from nothing through ruff and mypy to all tests, as the README's second list does."""
    installation = [words for words in windows_steps(0) if words[0] == "python3" or "pip" in words]
    assert steps(would_run(fresh, "test")) == installation + windows_steps(1)


def test_train_takes_the_branch(fresh: Path) -> None:
    """``make train BRANCH=sports`` trains that branch with LoRA, and installs nothing that is installed."""
    (fresh / ".venv").mkdir()
    (fresh / ".venv" / "installed").touch()
    commands = would_run(fresh, "train", "BRANCH=sports")
    assert commands[-1] == [".venv/bin/sheily", "train", "--branch", "sports", "--lora"]
    assert not [words for words in commands if "pip" in words]
    assert would_run(fresh, "list-branches") == [[".venv/bin/sheily", "branches", "list"]]


def installed(folder: Path, **programs: str) -> None:
    """Make the folder look installed, with these programs (shell lines) in its environment."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "installed").touch()
    for name, line in programs.items():
        program = folder / ".venv" / "bin" / name
        program.write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
        program.chmod(0o755)


def test_demo_omega_starts_trains_and_stops_a_worker(fresh: Path) -> None:
    """``make demo-omega`` ends with the example's last words, its worker saved and gone, all in a folder of its own."""
    python = f'exec {shlex.quote(sys.executable)} "$@"'
    installed(fresh, python=python, sheily=python.replace('"$@"', '-m sheily_train "$@"'))
    (fresh / "sheily_train").symlink_to(ROOT / "sheily_train")
    done = subprocess.run(
        ["make", "demo-omega"],
        cwd=fresh,
        env=environment() | {"PYTHONPATH": str(ROOT), "SHEILY_HOME": "/nowhere"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("✅ Ejemplo completo\n")
    home = fresh / "var" / "demo-omega"
    assert "Guardado en" in (home / "worker.log").read_text(encoding="utf-8").splitlines()[-1]
    assert (home / "worker.log").stat().st_mode & 0o077 == 0
    assert (home / "var" / "central_logs" / "omega_ejemplo.html").is_file()


def test_demo_omega_tells_why_its_worker_did_not_start(fresh: Path) -> None:
    """A worker that ends at once ends ``make demo-omega`` too, with what the worker said."""
    installed(fresh, sheily="echo 'Error: no hay sitio' >&2; exit 5")
    done = subprocess.run(["make", "demo-omega"], cwd=fresh, env=environment(), capture_output=True, text=True)
    assert done.returncode != 0
    assert "Error: no hay sitio" in done.stdout


def test_audit_asks_about_every_pinned_version(fresh: Path) -> None:
    """``make audit`` installs its own tool, and only that, then gives it the pinned set; ``make test`` never does."""
    installed(fresh)
    commands = would_run(fresh, "audit")
    assert [words[-1] for words in commands if "pip" in words] == [".[audit]"]
    assert commands[-1][:3] == [".venv/bin/pip-audit", "--requirement", "constraints.txt"]
    assert not any("pip-audit" in word for words in would_run(fresh, "test") for word in words)


def test_audit_fails_when_a_hole_is_found(fresh: Path) -> None:
    """What the tool finds makes make fail too."""
    installed(fresh, **{"pip-audit": "echo 'Found 1 known vulnerability'; exit 1"})
    (fresh / ".venv" / "installed-audit").touch()
    done = subprocess.run(["make", "audit"], cwd=fresh, env=environment(), capture_output=True, text=True)
    assert done.returncode != 0
    assert "Found 1 known vulnerability" in done.stdout


def test_the_audits_tool_takes_the_pinned_set(fresh: Path) -> None:
    """The real tool, told not to ask the service, reads every line of constraints.txt with the options of make."""
    pytest.importorskip("pip_audit", reason="the extra audit is not installed")
    installed(fresh)
    options = would_run(fresh, "audit")[-1][1:]
    done = subprocess.run(
        [sys.executable, "-m", "pip_audit", *options, "--dry-run"], cwd=fresh, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").count("==")
    assert f"would have audited {pinned} packages" in done.stderr


def test_an_old_python_is_told(fresh: Path) -> None:
    """The first step of the installation names the Python that is needed, and how to say which one to use."""
    [check] = [words for words in would_run(fresh, "install") if "-c" in words]
    assert "3.11" in check[2]
    assert "make install PYTHON=" in check[2]
    older = check[2].replace("sys.version_info < (3, 11)", "sys.version_info < (99,)")
    done = subprocess.run(["python3", "-c", older], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Hace falta Python 3.11")


def test_ci_runs_make_test_and_nothing_else(tmp_path: Path) -> None:
    """``.ci/run``, started anywhere, calls make once, with ``test``, in the checkout, and ends as it does."""
    log = tmp_path / "log"
    (tmp_path / "make").write_text(f'#!/bin/sh\necho "$PWD: $*" >> {log}\nexit 3\n')
    (tmp_path / "make").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run([ROOT / ".ci" / "run"], cwd=tmp_path, env=environment() | {"PATH": path})
    assert done.returncode == 3
    assert log.read_text() == f"{ROOT.resolve()}: test\n"
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith("#")]
    assert [line.split()[0] for line in commands] == ["set", "cd", "make"]
