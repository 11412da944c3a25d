from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from sheily_train.core.training import specialist
from sheily_train.errors import RequestError


def stage(folder: Path, version: str, *names: str) -> Path:
    """An unpublished model whose files say its version."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(version)
    config = {"files": dict.fromkeys(names, "…"), "data": {"hash": version}, "request": {}}
    (folder / "training_config.json").write_text(json.dumps(config))
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Every file but the configuration, with what it says."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "training_config.json"
    }


def test_a_published_model_replaces_the_earlier_one(tmp_path: Path) -> None:
    """Files that the new one lacks go, files of the person's own stay, and the staging folder is gone."""
    staging, output = tmp_path / "staging", tmp_path / "models" / "physics"
    specialist.publish(stage(staging, "one", "adapter.safetensors", "chat/template", "old.json"), output)
    assert contents(output) == {"adapter.safetensors": "one", "chat/template": "one", "old.json": "one"}
    (output / "notes.txt").write_text("mine")
    specialist.publish(stage(staging, "two", "adapter.safetensors", "chat/template"), output)
    assert contents(output) == {"adapter.safetensors": "two", "chat/template": "two", "notes.txt": "mine"}
    assert specialist.state_of(output, "two") == "current"
    assert not staging.exists()


@pytest.mark.parametrize("moves", range(4))
def test_a_move_that_was_cut_short_is_ended_by_the_next(
    moves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut after any number of files, the output holds no model, never a mixture; the next call ends the move."""
    staging, output = tmp_path / "staging", tmp_path / "output"
    specialist.publish(stage(staging, "one", "a", "b"), output)
    stage(staging, "two", "a", "b", "c")
    replace, done = Path.replace, 0

    def counted(path: Path, target: Path) -> Path:
        nonlocal done
        if done == moves:
            raise KeyboardInterrupt
        done += 1
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", counted)
        with pytest.raises(KeyboardInterrupt):
            specialist.publish(staging, output)
    assert specialist.read_config(output) is None
    assert specialist.is_complete(staging)
    specialist.publish(staging, output)
    assert contents(output) == {"a": "two", "b": "two", "c": "two"}
    assert specialist.state_of(output, "two") == "current"


def test_a_model_is_published_on_another_file_system_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the output is a mount or a link to another disk, which no file can be moved to, its bytes get there."""
    staging, output = tmp_path / "staging", tmp_path / "output"
    specialist.publish(stage(staging, "one", "a", "b"), output)
    stage(staging, "two", "a", "chat/template")
    replace = Path.replace

    def within_one_disk(path: Path, target: Path) -> Path:
        if staging in path.parents:
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(path))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", within_one_disk)
    specialist.publish(staging, output)
    assert contents(output) == {"a": "two", "chat/template": "two"}
    assert specialist.state_of(output, "two") == "current"
    assert not staging.exists()


def test_the_state_follows_the_data(tmp_path: Path) -> None:
    """None before training, current for the same data, stale for other data, none again when a file is lost."""
    assert specialist.state_of(tmp_path, "one") == "none"
    stage(tmp_path, "one", "adapter.safetensors")
    assert specialist.state_of(tmp_path, "one") == "current"
    assert specialist.state_of(tmp_path, "two") == "stale"
    (tmp_path / "adapter.safetensors").unlink()
    assert specialist.state_of(tmp_path, "one") == "none"


@pytest.mark.parametrize("config", [None, "{", "[]", '{"files": {}, "data": {}}', b"\xff"])
def test_a_folder_without_finished_model_is_told_how_to_get_one(config: Any, tmp_path: Path) -> None:
    """No configuration, a broken one, one of somebody else's: the message names the command that trains."""
    if config is not None:
        content = config if isinstance(config, bytes) else config.encode()
        (tmp_path / "training_config.json").write_bytes(content)
    with pytest.raises(RequestError, match="«physics» no tiene modelo") as caught:
        specialist.require_config(tmp_path, "physics")
    assert "sheily train --branch physics" in caught.value.mend


def test_require_config_gives_the_configuration(tmp_path: Path) -> None:
    """Of a finished model."""
    stage(tmp_path, "one", "a")
    assert specialist.require_config(tmp_path, "physics")["data"] == {"hash": "one"}


def test_staging_is_complete_with_its_configuration(tmp_path: Path) -> None:
    """The configuration is written last."""
    (tmp_path / "adapter.safetensors").touch()
    assert not specialist.is_complete(tmp_path)
    stage(tmp_path, "one")
    assert specialist.is_complete(tmp_path)
