"""This machine's checks: each thing that can be wrong is found, named and mended."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import sys
from pathlib import Path

import pytest

from sheily_train.colab import local_checks
from sheily_train.colab.findings import State
from sheily_train.colab.journal import Journal
from sheily_train.colab.protocol import Kind

pytestmark = pytest.mark.usefixtures("own_home")


def test_this_environment_has_its_packages() -> None:
    """The real list of the project, against what is installed here."""
    assert [check.state for check in local_checks.packages()] == [State.OK]
    assert [check.found.split(",")[0] for check in local_checks.python()] == [re.match(r"[\d.]+", sys.version)[0]]  # type: ignore[index]


def checkout(folder: Path, monkeypatch: pytest.MonkeyPatch, *dependencies: str) -> Path:
    """A project folder of the test's own, with every file, all executable."""
    (folder / "pyproject.toml").write_text(f"[project]\ndependencies = {json.dumps(dependencies)}\n")
    for name in local_checks.PROJECT_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch(0o755)
    monkeypatch.setattr(local_checks, "CHECKOUT", folder)
    return folder


def test_packages_that_are_missing_or_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by name, with the version that is there, the one that is wanted, and the line that installs it."""
    wanted = ("click>=999", "no-such-package[x]>=1", "numpy>=1", 'other>=1; sys_platform == "none"')
    checkout(tmp_path, monkeypatch, *wanted)
    missing, old = local_checks.packages()
    assert re.fullmatch(r"click [\d.]+; hace falta >=999", old.found)
    assert old.mend.endswith("make install, o: pip install 'click>=999'")
    assert (missing.state, missing.found) == (State.BAD, "faltan no-such-package")
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    assert [check.found for check in local_checks.packages()] == ["faltan no-such-package, other"]


def test_an_installed_package_needs_no_project_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own list of packages counts, and there are no files to miss."""
    monkeypatch.setattr(local_checks, "CHECKOUT", tmp_path)
    assert {check.state for check in (*local_checks.packages(), *local_checks.files())} == {State.OK}
    assert list(local_checks.permissions()) == []


def test_files_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them at once, with the line that brings them back."""
    root = checkout(tmp_path, monkeypatch)
    assert [check.state for check in local_checks.files()] == [State.OK]
    (root / "conectar_colab.sh").unlink()
    [found] = local_checks.files()
    assert (found.state, found.found) == (State.BAD, "faltan conectar_colab.sh")
    assert found.mend.endswith(f"git -C {root} checkout -- conectar_colab.sh")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permission")
def test_scripts_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line that mends it does."""
    root = checkout(tmp_path, monkeypatch)
    assert [check.state for check in local_checks.permissions()] == [State.OK]
    (root / "verificar_setup_colab.sh").chmod(0o644)
    [found] = local_checks.permissions()
    assert found.state is State.BAD
    assert found.mend == f"chmod +x {root / 'verificar_setup_colab.sh'}"


def test_room_on_disk_and_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough, tight, or too little."""
    for check, limits in ((local_checks.disk, "_DISK"), (local_checks.memory, "_MEMORY")):
        for values, state in (((0, 0), State.OK), ((0, 1 << 60), State.WARNING), ((1 << 60, 1 << 60), State.BAD)):
            monkeypatch.setattr(local_checks, limits, values)
            [found] = check()
            assert (found.state, bool(found.mend)) == (state, state is not State.OK)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
@pytest.mark.parametrize(
    ("script", "state", "said"),
    [
        ("echo 'Tesla T4, 15360 MiB, 15000 MiB'", State.OK, "Tesla T4, 15360 MiB, 15000 MiB"),
        ("echo NVIDIA-SMI has failed >&2; exit 9", State.WARNING, "NVIDIA-SMI has failed"),
    ],
)
def test_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, state: State, said: str) -> None:
    """What nvidia-smi says, without torch; a driver that is broken is told. (A stand-in: there is no card here.)"""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    [found] = local_checks.gpu()
    assert found.state is state
    assert said in found.found


def test_without_a_card_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker has it."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert [check.state for check in local_checks.gpu()] == [State.OK]


def test_write_access(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried for real, leaving nothing behind; a place that takes no files is told."""
    before = sorted(own_home.rglob("*"))
    assert [check.state for check in local_checks.writable()] == [State.OK]
    assert sorted(own_home.rglob("*")) == before
    if Path("/proc/self").exists():
        monkeypatch.setenv("SHEILY_HOME", "/proc")
        [found] = local_checks.writable()
        assert found.state is State.BAD
        assert "/proc" in found.found


def test_a_run_that_was_left_half_way(own_home: Path) -> None:
    """What waits in its journal, and the order that goes on with it; while it runs nothing is wrong."""
    folder = own_home / "var" / "omega" / "nocturno"
    with Journal(folder, "nocturno") as journal:
        journal.append(Kind.TRAIN, "application/json", b"{}")
        assert [(check.state, check.found) for check in local_checks.journals()] == [
            (State.OK, "«nocturno» está en marcha")
        ]
    files = sorted(folder.iterdir())
    [found] = local_checks.journals()
    assert (found.state, found.found) == (State.WARNING, "«nocturno» quedó a medias, con 1 sin respuesta")
    assert found.mend.endswith("sheily connect URL --continuar --run nocturno")
    assert sorted(folder.iterdir()) == files
    with Journal(folder, "nocturno") as journal:
        journal.answered(1, b"{}")
        journal.sessions = [{"done": True}, {"done": False}]
    [found] = local_checks.journals()
    assert "con 0 sin respuesta" in found.found
    with Journal(folder, "nocturno") as journal:
        journal.sessions = [{"done": True}, {"done": True}]
    assert [check.found for check in local_checks.journals()] == ["1, ninguno a medias"]


def test_a_journal_that_cannot_be_read(own_home: Path) -> None:
    """A damaged file is told by its run, and is not touched."""
    file = own_home / "var" / "omega" / "roto" / "journal.sqlite"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"not a database" * 1000)
    [found] = local_checks.journals()
    assert found.state is State.BAD
    assert "«roto»" in found.found
    assert file.read_bytes() == b"not a database" * 1000
