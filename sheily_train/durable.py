"""Writes that survive a crash: temporary name, fsync, rename, fsync of the folder.

After any of these functions has returned, the data are on the disk; if one raises or the process dies, the previous
content is intact. An ``fsync`` that fails is never retried: the kernel may already have dropped the pages.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def sha256_file(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """Push a file's written content to the disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Push a folder's entries (creations and renames) to the disk. Windows has no such call and needs none."""
    if os.name == "nt":  # pragma: no cover
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder, and those above it that are missing, so that what is synced in it can be found again.

    A file's own sync does not keep the entry of a new folder above it: a power cut would take all of it away.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync_folder(folder.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``, wholly or not at all."""
    make_folder(path.parent)
    with _replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path``; what was written there, and synced, takes its place when the context ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            yield temporary
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Raise as :class:`OSError`, with its number and ``path``, what the system says of a write there.

    What is raised for an open file lacks the name; what safetensors and tokenizers raise is no :class:`OSError`.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def move(source: Path, target: Path) -> None:
    """Let a synced file take another's place, wholly or not at all; on another file system its bytes are copied."""
    try:
        source.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with _replacing(target) as temporary:
            shutil.copyfile(source, temporary)
            sync_file(temporary)


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as readable JSON, wholly or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode(errors="backslashreplace"))  # of a file name that is not UTF-8; JSON's own escape


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors and push them to the disk. Raises :class:`OSError` when the disk is full."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with naming(path):
        save_file(contiguous, path, metadata=metadata)
    sync_file(path)


def is_full_disk(error: OSError) -> bool:
    """Whether a write failed for want of room: disk, quota or the process's file-size limit."""
    return error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in ``path``; ``None`` when the file is absent or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
