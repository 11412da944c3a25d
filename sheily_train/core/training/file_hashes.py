"""Hashes of large files, each computed once a process."""

from __future__ import annotations

import functools
from pathlib import Path

from sheily_train import durable


def kept_sha256(file: Path) -> str:
    """The sha256 of a file, in hexadecimal; computed anew only when its size or time has changed."""
    stat = file.stat()
    return _sha256(file, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _sha256(file: Path, _size: int, _time: int) -> str:
    return durable.sha256_file(file)
