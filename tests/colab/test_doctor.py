"""The doctor: it looks at everything, and goes on when a check cannot be made."""

from __future__ import annotations

import sys

import pytest

from sheily_train.colab import local_checks
from sheily_train.colab.doctor import examine
from sheily_train.colab.findings import Check, State

pytestmark = pytest.mark.usefixtures("own_home")


def local(name: str) -> list[Check]:
    return [check for check in examine() if check.name == name]


def test_torch_is_asked_only_when_wanted() -> None:
    """Its version and the devices that it sees."""
    import torch

    assert local("PyTorch") == []
    [found] = [check for check in examine(with_torch=True) if check.name == "PyTorch"]
    assert found.state is State.OK
    assert found.found.startswith(torch.__version__)


def test_a_missing_package_does_not_silence_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told, and everything else is looked at all the same."""
    for name in ("psutil", "httpx2", "dotenv"):
        monkeypatch.setitem(sys.modules, name, None)
    found = {check.name: check for check in examine("http://127.0.0.1:1")}
    assert found["Memoria"].found == "Falta el paquete «psutil»."
    assert "make install" in found["Memoria"].mend
    assert found["Trabajador"].state is State.BAD
    assert found["Diarios"].state is State.OK


def test_a_check_that_fails_by_itself_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is raised, the rest goes on."""
    monkeypatch.setattr(local_checks, "disk", lambda: 1 / 0)
    [found] = local("Disco")
    assert found.found == "No se pudo comprobar: ZeroDivisionError: division by zero"
