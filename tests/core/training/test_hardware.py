from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from sheily_train.core.training import hardware


def test_this_machine_is_seen_as_it_is() -> None:
    """CUDA facts are empty without a card; threads are those torch will use; some memory is free."""
    machine = hardware.inspect_machine()
    assert machine.cuda == torch.cuda.is_available()
    if not machine.cuda:
        assert (machine.cuda_bf16, machine.cuda_name, machine.cuda_free) == (False, "", 0)
    assert machine.threads == torch.get_num_threads()
    assert 0 < machine.memory_free <= psutil.virtual_memory().total


@pytest.mark.parametrize("capability", ["amx_bf16", "avx512_bf16", "avx2", None])
@pytest.mark.parametrize(
    ("limit", "allowed"),
    [
        (None, True),
        ("all", True),
        ("DEFAULT", True),
        ("AVX512_CORE_BF16", True),
        ("AVX512_CORE_AMX", True),
        ("AVX512_CORE", False),
        ("AVX2", False),
    ],
)
def test_fast_bf16_needs_the_processor_and_leave_to_use_it(
    capability: str | None, limit: str | None, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AMX or AVX512-BF16, unless oneDNN was told to use less than that."""
    found = {capability: True} if capability else {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    if limit is None:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    else:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert hardware.cpu_has_fast_bf16() == (allowed and capability in {"amx_bf16", "avx512_bf16"})


def test_a_torch_that_does_not_tell_has_no_fast_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 is the safe choice."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not hardware.cpu_has_fast_bf16()


@pytest.mark.parametrize(
    ("limit", "free"),
    [("3000000", 1_500_000), ("1000000", 0), ("9" * 18, None), ("max", None), (None, None)],
    ids=["limit", "used up", "beyond the machine", "no limit", "no container"],
)
def test_free_memory_is_what_the_container_leaves(
    limit: str | None, free: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit less what is in use; file pages that the kernel gives back when asked do not count as used."""
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text("2000000\n")
        (tmp_path / "memory.stat").write_text("anon 1000000\ninactive_file 500000\nactive_file 500000\n")
    expected = free if free is not None else psutil.virtual_memory().available
    assert hardware.free_memory() == pytest.approx(expected, rel=0.1)


def test_peak_memory_is_the_most_ever_held() -> None:
    """No less than now, in bytes; it stays when the memory is given back."""
    block = b"x" * 50_000_000
    held = psutil.Process().memory_info().rss
    del block
    peak = hardware.peak_memory()
    assert held <= peak * 1.01
    assert peak < 100 * held
    assert hardware.peak_memory() >= peak


def test_peak_memory_is_this_process_own() -> None:
    """A small process that a large one starts does not count what the large one held."""
    block = b"x" * 1_000_000_000
    program = "from sheily_train.core.training.hardware import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < len(block)


def test_free_disk_is_that_of_the_folder_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the nearest folder that is there, for relative paths too."""
    monkeypatch.chdir(tmp_path)
    free = shutil.disk_usage(tmp_path).free
    for folder in (tmp_path, tmp_path / "not" / "yet", Path("not/yet")):
        assert hardware.free_disk(folder) == pytest.approx(free, rel=0.05)


def test_the_fingerprint_is_the_same_twice_and_ready_for_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions, processor and threads: what decides the bits."""
    first = hardware.fingerprint("cpu")
    assert json.loads(json.dumps(first)) == first == hardware.fingerprint("cpu")
    assert first["torch"] == torch.__version__
    assert first["processor"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert hardware.fingerprint("cpu") == first | {"threads": 99}
