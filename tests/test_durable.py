from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors import safe_open

from sheily_train import durable
from tests.full_disk import full_disk_after

WRITER = """
import sys
from pathlib import Path
from sheily_train import durable
path = Path(sys.argv[1])
print("ready", flush=True)
while True:
    for letter in b"ab":
        durable.write_bytes(path, bytes([letter]) * 8_000_000)
"""


def test_write_bytes_replaces_the_whole_content(tmp_path: Path) -> None:
    """The new content stands alone: nothing of the old one, no temporary file; the folder is made."""
    path = tmp_path / "new" / "file"
    for content in (b"a longer content", b"short"):
        durable.write_bytes(path, content)
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_write_bytes_syncs_file_then_renames_then_syncs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that survives a power cut; the real calls are made, and noted."""
    done: list[str] = []
    sync, replace = os.fsync, Path.replace

    def noted_sync(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def noted_replace(path: Path, target: Path) -> Path:
        done.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    durable.write_bytes(tmp_path / "file", b"content")
    assert done == ["file", "rename", "folder"]


def save_tokenizer(path: Path) -> None:
    """As a library in Rust does it, whose errors are of its own kind."""
    words = {f"palabra{number}": number for number in range(500)}
    with durable.naming(path):
        tokenizers.Tokenizer(tokenizers.models.WordLevel(words)).save(str(path.with_name("new")))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: durable.write_bytes(path, b"x" * 5000),
        lambda path: durable.save_tensors(path.with_name("new"), {"x": torch.zeros(5000)}),
        save_tokenizer,
    ],
    ids=["bytes", "tensors", "tokenizer"],
)
def test_a_full_disk_raises_its_number_and_keeps_the_old_content(write: Callable[[Path], None], tmp_path: Path) -> None:
    """What was there stays, no temporary name is left, and the error is recognised as a full disk, with its place."""
    path = tmp_path / "file"
    durable.write_bytes(path, b"old")
    with full_disk_after(1000), pytest.raises(OSError, match="large") as caught:
        write(path)
    assert durable.is_full_disk(caught.value)
    assert Path(caught.value.filename).parent == tmp_path
    assert path.read_bytes() == b"old"
    assert {entry.name for entry in tmp_path.iterdir()} <= {"file", "new"}


def test_a_killed_writer_leaves_one_content_or_the_other(tmp_path: Path) -> None:
    """Whatever the moment of a kill -9, the file holds one whole content."""
    path = tmp_path / "file"
    for _kill in range(5):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            with contextlib.suppress(subprocess.TimeoutExpired):
                writer.wait(timeout=0.15)
            writer.send_signal(signal.SIGKILL)
        assert path.read_bytes() in {bytes([letter]) * 8_000_000 for letter in b"ab"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES])
def test_is_full_disk_knows_want_of_room(number: int) -> None:
    """Disk, quota and file-size limit are want of room; a missing right is not."""
    assert durable.is_full_disk(OSError(number, os.strerror(number))) is (number != errno.EACCES)


def test_save_tensors_keeps_values_and_metadata(tmp_path: Path) -> None:
    """Also of a tensor that is not contiguous."""
    tensor = torch.arange(6).reshape(2, 3).T
    durable.save_tensors(tmp_path / "x.safetensors", {"x": tensor}, {"format": "pt"})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("x"), tensor)
        assert file.metadata() == {"format": "pt"}


def test_save_tensors_gives_the_systems_error_its_number(tmp_path: Path) -> None:
    """Also of other failures than a full disk."""
    with pytest.raises(FileNotFoundError):
        durable.save_tensors(tmp_path / "absent" / "x.safetensors", {"x": torch.zeros(1)})


def test_json_comes_back_and_is_readable(tmp_path: Path) -> None:
    """Accents are not escaped, lines are indented, the last one ends."""
    durable.write_json(tmp_path / "x.json", {"año": [1, None]})
    assert durable.read_json(tmp_path / "x.json") == {"año": [1, None]}
    assert (tmp_path / "x.json").read_text(encoding="utf-8").startswith('{\n  "año": [')
    assert (tmp_path / "x.json").read_bytes().endswith(b"}\n")


def test_json_holds_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    """What an old archive called in Latin-1 can be written down, and is the same name when read."""
    name = os.fsdecode(b"f\xedsica.jsonl")
    durable.write_json(tmp_path / "x.json", {"training": [name]})
    assert durable.read_json(tmp_path / "x.json") == {"training": [name]}


@pytest.mark.parametrize("content", [None, b"[1]", b'{"a": ', b"\xff"])
def test_read_json_gives_none_for_anything_but_an_object(content: bytes | None, tmp_path: Path) -> None:
    """Absent, another value, cut short, not UTF-8."""
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    assert durable.read_json(tmp_path / "x.json") is None


def test_sha256_file_is_that_of_the_content(tmp_path: Path) -> None:
    """The same as of the bytes."""
    (tmp_path / "x").write_bytes(b"content")
    assert durable.sha256_file(tmp_path / "x") == hashlib.sha256(b"content").hexdigest()
