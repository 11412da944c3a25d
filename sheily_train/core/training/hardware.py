"""What the machine has: devices, precisions, free memory and disk."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from sheily_train import __version__
from sheily_train.core.processor import cpu_has_fast_bf16
from sheily_train.core.training import kernels

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """The facts a placement depends on. Memory in bytes."""

    cuda: bool
    cuda_bf16: bool
    cuda_name: str
    cuda_free: int
    mps: bool
    cpu_bf16: bool
    threads: int
    memory_free: int


def inspect_machine() -> Machine:
    """Look at this machine now."""
    cuda = torch.cuda.is_available()
    return Machine(
        cuda=cuda,
        cuda_bf16=cuda and torch.cuda.is_bf16_supported(including_emulation=False),
        cuda_name=torch.cuda.get_device_name() if cuda else "",
        cuda_free=torch.cuda.mem_get_info()[0] if cuda else 0,
        mps=torch.backends.mps.is_available(),
        cpu_bf16=cpu_has_fast_bf16(),
        threads=torch.get_num_threads(),
        memory_free=free_memory(),
    )


def free_memory() -> int:
    """Bytes of memory that a new process can use: the system's, or what the container's limit leaves."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        counts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        used -= int(counts["inactive_file"])  # cached file pages, which the kernel gives back when asked
    except (OSError, ValueError, KeyError):
        return available
    return available if limit == "max" else max(0, min(available, int(limit) - used))


def peak_memory() -> int:
    """Most bytes this process has held in memory so far."""
    if sys.platform == "win32":  # pragma: no cover
        peak = psutil.Process().memory_info().peak_wset
    elif sys.platform == "linux":  # getrusage's figure begins with what the process that started this one had held
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
        peak = int(line.split()[1]) * 1024
    else:  # pragma: no cover
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the machine or of a card, would not do."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def free_disk(folder: Path) -> int:
    """Bytes free where ``folder`` is, or would be created."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def fingerprint(device: str) -> dict[str, Any]:
    """What two runs must share to agree bit for bit: versions, processor or card, threads, compiled kernels."""
    import peft
    import transformers

    processor = torch.cuda.get_device_name() if device == "cuda" else _processor_name()
    return {
        "sheily_train": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "device": device,
        "processor": processor,
        "threads": torch.get_num_threads(),
        "kernels": kernels.fingerprint() if device == "cpu" else "",
    }


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def make_deterministic(device: str) -> None:
    """Ask for the same bits each time: needed on CUDA, already so on the CPU for a fixed number of threads."""
    if device == "cuda":  # pragma: no cover
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
