"""The compiled form of ``kernels.c``, where a C compiler is at hand: built once for a processor, kept in the cache.

On Linux, with ``$CC`` or the ``cc`` on the path. Anywhere else, and where it does not compile, there are no kernels,
and PyTorch's operations compute the same, slower.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sheily_train import durable, paths

_SOURCE = Path(__file__).with_name("kernels.c")
_SECONDS = 120
_FLAGS = ("-O3", "-funroll-loops", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-lm")
_NATIVE = ("-march=native", "-mprefer-vector-width=512") if platform.machine() == "x86_64" else ("-mcpu=native",)
_TYPES = {torch.float32: (), torch.bfloat16: ("-DBF16",)}

LANE = 16
"""Narrow products take rows whose length is a multiple of it, and ranks up to it; attention, heads of a multiple."""

Kernel = Callable[..., None]


def kernel(name: str, dtype: torch.dtype) -> Kernel:
    """A function of ``kernels.c`` for numbers of this type: tensors go in as their first element's address.

    On PyTorch's meta device it does nothing, as all that computes there.

    Raises:
        LookupError: there is none; :func:`available` tells.
        MemoryError: by the function; what it was to write is not to be used then.
    """
    library = _library(dtype)
    if library is None:
        raise LookupError(name)
    function = getattr(library, name)

    def run(first: torch.Tensor, *others: Any) -> None:
        if not first.is_meta and function(*map(_c, (first, *others)), ctypes.c_int(torch.get_num_threads())):
            raise MemoryError(name)

    return run


def available(dtype: torch.dtype) -> bool:
    """Whether there are kernels for numbers of this type on this machine."""
    return _library(dtype) is not None


def fingerprint() -> str:
    """What says which kernels compute here: runs agree bit for bit where it is the same. Empty without kernels."""
    return _key()[:12] if available(torch.float32) and available(torch.bfloat16) else ""


def _c(argument: torch.Tensor | float | int | None) -> Any:
    if argument is None:
        return ctypes.c_void_p()
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_long(argument)


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    if dtype not in _TYPES or not _same_threads():
        return None
    path = paths.cache_dir() / "kernels" / f"{_key()[:16]}-{str(dtype).partition('.')[2]}.so"
    try:
        if not path.exists():
            _compile(path, _TYPES[dtype])
        library = ctypes.CDLL(str(path))
    except (OSError, ValueError, subprocess.SubprocessError):  # ValueError: $CC is no command
        return None
    return library


def _same_threads() -> bool:
    """Whether PyTorch's threads are those of the OpenMP that the compiler would link: two pools would fight."""
    if sys.platform != "linux":
        return False
    return any(line.rstrip().endswith("/libgomp.so.1") for line in Path("/proc/self/maps").read_text().splitlines())


@functools.cache
def _key() -> str:
    """Of the source, how it is compiled, and the processor's instructions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    instructions = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(_SOURCE.read_bytes() + repr((_FLAGS, _NATIVE, instructions)).encode()).hexdigest()


def _compile(path: Path, definitions: tuple[str, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        compiler = shlex.split(os.environ.get("CC") or "cc")
        words = [*compiler, *definitions, *_NATIVE, str(_SOURCE), "-o", str(built), *_FLAGS]
        subprocess.run(words, check=True, capture_output=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
        durable.sync_file(built)
        built.replace(path)  # whole or not at all, whoever else compiles it
