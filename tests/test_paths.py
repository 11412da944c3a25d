from __future__ import annotations

from pathlib import Path

import pytest

from sheily_train import paths


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder outside any project, and a package installed outside any checkout."""
    for name in ("SHEILY_HOME", "SHEILY_BRANCHES_DIR", "SHEILY_MODELS_DIR", "SHEILY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(paths, "__file__", str(tmp_path / "site-packages" / "sheily_train" / "paths.py"))
    folder = tmp_path / "project" / "deep" / "er"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def test_the_root_is_the_current_folder_without_branches(nowhere: Path) -> None:
    """Where there is no project, one begins here."""
    assert paths.project_root() == nowhere


def test_the_root_is_the_nearest_folder_with_branches(nowhere: Path) -> None:
    """From the current folder upwards; a nearer folder wins, a file of that name does not count."""
    (nowhere / "all-Branches").touch()
    for root in (nowhere.parent.parent, nowhere.parent):
        (root / "all-Branches").mkdir()
        assert paths.project_root() == root


def test_the_root_is_the_checkout_when_nothing_is_nearer(nowhere: Path) -> None:
    """A package that lies in a checkout finds the checkout's branches from anywhere."""
    checkout = Path(paths.__file__).parent.parent
    (checkout / "all-Branches").mkdir(parents=True)
    assert paths.project_root() == checkout
    (nowhere / "all-Branches").mkdir()
    assert paths.project_root() == nowhere


def test_the_environment_names_the_root(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SHEILY_HOME comes before any folder that was found; all other folders hang from the root."""
    (nowhere / "all-Branches").mkdir()
    monkeypatch.setenv("HOME", str(nowhere))
    monkeypatch.setenv("SHEILY_HOME", "~/other")
    assert paths.branches_dir() == nowhere / "other" / "all-Branches"
    assert paths.models_dir() == nowhere / "other" / "var" / "central_models"
    assert paths.logs_dir() == nowhere / "other" / "var" / "central_logs"


def test_the_environment_names_branches_and_models_apart(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data on one disk, results on another; the logs stay with the project."""
    monkeypatch.setenv("HOME", str(nowhere))
    monkeypatch.setenv("SHEILY_HOME", str(nowhere))
    monkeypatch.setenv("SHEILY_BRANCHES_DIR", "~/data")
    monkeypatch.setenv("SHEILY_MODELS_DIR", "results")
    assert paths.branches_dir() == nowhere / "data"
    assert paths.models_dir() == nowhere / "results"
    assert paths.logs_dir() == nowhere / "var" / "central_logs"


def test_the_cache_is_where_the_environment_says(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SHEILY_CACHE, then XDG_CACHE_HOME, then the user's .cache."""
    monkeypatch.setenv("HOME", "/home/ana")
    assert paths.cache_dir() == Path("/home/ana/.cache/sheily-train")
    monkeypatch.setenv("XDG_CACHE_HOME", "/big/disk")
    assert paths.cache_dir() == Path("/big/disk/sheily-train")
    monkeypatch.setenv("SHEILY_CACHE", "~/own")
    assert paths.cache_dir() == Path("/home/ana/own")


def test_the_work_folder_is_hidden_beside_the_output() -> None:
    """On the same disk as the output, so that a rename is whole, and out of sight."""
    assert paths.work_dir(Path("models/physics")) == Path("models/.physics.work")
