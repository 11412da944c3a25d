from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sheily_train import durable
from sheily_train.core.training import checkpoint
from tests.full_disk import full_disk_after

WRITER = """
import sys, torch
from pathlib import Path
from sheily_train.core.training import checkpoint
for step in range(10_000):
    checkpoint.save(Path(sys.argv[1]), step, {"x": torch.full((500_000,), float(step))}, {"step": step})
    if step == 1:
        print("ready", flush=True)
"""


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        checkpoint.save(folder, step, {"x": torch.full((1000,), float(step))}, {"step": step})


def newest(folder: Path) -> int | None:
    """The step of the newest checkpoint that verifies, after a look at its content."""
    found, _damaged = checkpoint.load_newest(folder)
    if found is None:
        return None
    assert (found.tensors["x"] == found.step).all()
    assert found.state == {"step": found.step}
    return found.step


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def test_a_checkpoint_comes_back_to_the_bit(tmp_path: Path) -> None:
    """Tensors of every type the trainer has, and numbers beside them."""
    torch.manual_seed(0)
    tensors = {
        "weights/a": torch.randn(3, 4).T,
        "weights/b": torch.randn(5).to(torch.bfloat16),
        "step/a": torch.tensor(7.0),
    }
    state = {"before": 0.1 + 0.2, "best": None, "stopped": False}
    checkpoint.save(tmp_path, 7, tensors, state)
    found, damaged = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert (found.step, found.state, damaged) == (7, state, [])
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
    assert all(found.tensors[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_without_checkpoints_there_is_none(tmp_path: Path) -> None:
    """An absent folder is an empty one."""
    assert checkpoint.load_newest(tmp_path / "absent") == (None, [])


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    """By number, not by name; nothing unfinished stays beside them."""
    save(tmp_path, 8, 9, 10, 100)
    assert kept(tmp_path) == [10, 100]
    assert newest(tmp_path) == 100


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    """A resumed run that comes to the same step writes it anew."""
    checkpoint.save(tmp_path, 3, {"x": torch.zeros(1)}, {})
    save(tmp_path, 3)
    assert newest(tmp_path) == 3


DAMAGES: dict[str, Callable[[Path], object]] = {
    "tensors cut": lambda folder: (folder / "state.safetensors").write_bytes(b"x"),
    "one bit": lambda folder: (folder / "state.safetensors").write_bytes(
        (content := (folder / "state.safetensors").read_bytes())[:-1] + bytes([content[-1] ^ 1])
    ),
    "numbers changed": lambda folder: (folder / "state.json").write_text('{"step": 3}'),
    "tensors lost": lambda folder: (folder / "state.safetensors").unlink(),
    "manifest lost": lambda folder: (folder / "manifest.json").unlink(),
    "manifest cut": lambda folder: (folder / "manifest.json").write_text('{"state'),
    "manifest short": lambda folder: (folder / "manifest.json").write_text(
        json.dumps({"state.json": durable.sha256_file(folder / "state.json")})
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(damage: Callable[[Path], object], tmp_path: Path) -> None:
    """The one before it is loaded, and the damaged one is told."""
    save(tmp_path, 1, 2)
    damage(tmp_path / "step-00000002")
    assert newest(tmp_path) == 1
    assert checkpoint.load_newest(tmp_path)[1] == [tmp_path / "step-00000002"]


def test_damaged_checkpoints_do_not_push_a_new_one_out(tmp_path: Path) -> None:
    """When all were damaged and the run began anew, the next checkpoint stays and they go."""
    save(tmp_path, 48, 50)
    for step in (48, 50):
        DAMAGES["manifest lost"](tmp_path / f"step-000000{step}")
    save(tmp_path, 10)
    assert newest(tmp_path) == 10
    assert kept(tmp_path) == [10]


def test_a_full_disk_leaves_the_earlier_checkpoints(tmp_path: Path) -> None:
    """The error is a full disk's, nothing half-written stays, and the same save works once there is room."""
    save(tmp_path, 1, 2)
    with full_disk_after(2000), pytest.raises(OSError, match="large") as caught:
        save(tmp_path, 3)
    assert durable.is_full_disk(caught.value)
    assert kept(tmp_path) == [1, 2]
    assert newest(tmp_path) == 2
    save(tmp_path, 3)
    assert newest(tmp_path) == 3


def test_a_killed_writer_leaves_whole_checkpoints_and_no_growing_remains(tmp_path: Path) -> None:
    """After kill -9 while it saves, the newest verifies; what was unfinished goes with the next save."""
    for wait in (0.05, 0.11):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            with contextlib.suppress(subprocess.TimeoutExpired):
                writer.wait(timeout=wait)
            writer.kill()
        step = newest(tmp_path)
        assert step is not None
        assert step >= 1
        save(tmp_path, step + 1)
        assert len(kept(tmp_path)) == 2
