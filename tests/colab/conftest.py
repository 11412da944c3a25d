from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture
def own_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No journal, address or proxy of this machine has a part in these tests."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in {"COLAB_SERVER_URL", "SHEILY_TOKEN", "COLAB_TOKEN"}:
            monkeypatch.delenv(name)
    monkeypatch.chdir(home)
    return home
