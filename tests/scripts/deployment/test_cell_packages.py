from __future__ import annotations

import importlib
import sys
import zipfile
from pathlib import Path

import pytest

from sheily_train.scripts.deployment.cell_packages import install_missing


def make_wheel(folder: Path, name: str, version: str) -> None:
    """A wheel with one module."""
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{module}.py", f"VERSION = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip can see; what it installs goes where this process looks first."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "installed"))
    (tmp_path / "installed").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "installed"))
    return tmp_path / "wheels"


def test_what_is_there_is_left_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """New enough: no pip is started, nothing is said."""
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    install_missing(["click>=8.2", "numpy>=2"])
    assert capsys.readouterr().out == ""


def test_what_is_absent_is_installed(wheels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With this very Python's pip, so that the next import finds it; what is there is not named."""
    make_wheel(wheels, "sheily-absent-thing", "2.1")
    make_wheel(wheels, "click", "99.0")
    install_missing(["sheily-absent-thing>=2"])
    assert importlib.import_module("sheily_absent_thing").VERSION == "2.1"
    assert capsys.readouterr().out == "Instalando: sheily-absent-thing>=2\n"


def test_what_is_too_old_is_replaced(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions are compared as numbers; a package that is in use asks for a restart of the session."""
    with_old = tmp_path / "old"
    make_wheel(tmp_path / "before", "sheily-aged-thing", "2.9")
    with zipfile.ZipFile(tmp_path / "before" / "sheily_aged_thing-2.9-py3-none-any.whl") as wheel:
        wheel.extractall(with_old)
    monkeypatch.syspath_prepend(str(with_old))
    monkeypatch.setattr(sys, "path", [*sys.path[1:], str(with_old)])
    make_wheel(wheels, "sheily-aged-thing", "2.10")
    assert importlib.import_module("sheily_aged_thing").VERSION == "2.9"
    with pytest.raises(SystemExit, match="Reinicia la sesión"):
        install_missing(["sheily-aged-thing>=2.10"])
    del sys.modules["sheily_aged_thing"]
    assert importlib.import_module("sheily_aged_thing").VERSION == "2.10"


def test_when_pip_fails_its_reason_is_told(wheels: Path) -> None:
    """The names, and pip's own last words."""
    with pytest.raises(SystemExit, match=r"(?s)no pudo instalar sheily-no-such-thing>=1.*No matching distribution"):
        install_missing(["sheily-no-such-thing>=1"])
