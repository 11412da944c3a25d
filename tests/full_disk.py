"""A full disk, as the kernel reports it, without one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def full_disk_after(size: int) -> Iterator[None]:
    """No file of this process grows beyond ``size`` bytes: the write fails as it does for want of room."""
    resource = pytest.importorskip("resource", reason="file-size limits are POSIX")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
