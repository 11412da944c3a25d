from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheily_train.colab import snapshots
from sheily_train.colab.snapshots import Snapshot, Snapshots, pack_snapshot, unpack_snapshot
from sheily_train.errors import RefusedError


def snapshot_of(seq: int) -> Snapshot:
    return Snapshot(seq, {"seq": seq, "ledger": {"run": "uno", "ñ": [1.5]}}, {"weight": torch.full((4, 3), float(seq))})


def newest_seq(folder: Path) -> int | None:
    found, _damaged = Snapshots(folder).newest()
    return None if found is None else found.seq


def test_packing_gives_everything_back_and_the_same_bytes() -> None:
    """A packed snapshot unpacks to equal tensors and facts, and packs again to the same bytes."""
    content = pack_snapshot(snapshot_of(7))
    back = unpack_snapshot(content)
    assert back.seq == 7
    assert back.facts == snapshot_of(7).facts
    assert torch.equal(back.tensors["weight"], torch.full((4, 3), 7.0))
    assert pack_snapshot(back) == content


def test_a_snapshot_on_the_disk_is_the_packed_file(tmp_path: Path) -> None:
    """What lies on the disk is byte for byte what is sent, and the manifest holds its sha256."""
    Snapshots(tmp_path / "uno").save(snapshot_of(7))
    folder = tmp_path / "uno" / "snapshot-000000000007"
    assert (folder / "state.safetensors").read_bytes() == pack_snapshot(snapshot_of(7))
    assert list(json.loads((folder / "manifest.json").read_text())) == ["state.safetensors"]


def test_three_are_kept(tmp_path: Path) -> None:
    """Of five snapshots the newest three stay."""
    store = Snapshots(tmp_path)
    for seq in range(5):
        store.save(snapshot_of(seq))
    assert [path.name[-1] for path in store.folders()] == ["2", "3", "4"]


def test_saving_an_older_state_leaves_the_later_history(tmp_path: Path) -> None:
    """A snapshot of an earlier event, as after an upload, becomes the newest."""
    store = Snapshots(tmp_path)
    for seq in (5, 9, 6):
        store.save(snapshot_of(seq))
    assert newest_seq(tmp_path) == 6


@pytest.mark.parametrize("harm", ["flip", "cut", "no manifest", "bad manifest", "no file"])
def test_a_damaged_snapshot_is_passed_over(tmp_path: Path, harm: str) -> None:
    """Whatever happened to the newest one, the one before it is loaded and the damaged one is told."""
    store = Snapshots(tmp_path)
    store.save(snapshot_of(1))
    store.save(snapshot_of(2))
    newest = store.folders()[-1]
    file, manifest = newest / "state.safetensors", newest / "manifest.json"
    content = bytearray(file.read_bytes())
    if harm == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif harm == "cut":
        file.write_bytes(content[:-4])
    elif harm == "no manifest":
        manifest.unlink()
    elif harm == "bad manifest":
        manifest.write_text("{")
    else:
        file.unlink()
    found, damaged = store.newest()
    assert found is not None
    assert found.seq == 1
    assert damaged == [newest]


def test_nothing_there(tmp_path: Path) -> None:
    """A folder that does not exist holds no snapshot and is not made."""
    assert Snapshots(tmp_path / "none").newest() == (None, [])
    assert not (tmp_path / "none").exists()


def test_leftovers_of_a_killed_write_are_removed(tmp_path: Path) -> None:
    """A process killed just before the rename leaves a folder that is no snapshot and is gone after the next look."""
    code = f"""
import os, signal
from pathlib import Path
from tests.colab.test_snapshots import snapshot_of
from sheily_train.colab.snapshots import Snapshots
store = Snapshots(Path({str(tmp_path)!r}))
store.save(snapshot_of(1))
Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
store.save(snapshot_of(2))
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(Path.cwd())})
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / snapshots.UNFINISHED_SNAPSHOT).exists()
    assert newest_seq(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot-000000000001"]


def test_everything_is_synced_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of fsyncs and rename is: tensors, manifest, rename, parent folder."""
    told: list[str] = []
    real_sync, real_rename = os.fsync, Path.rename

    def sync(descriptor: int) -> None:
        told.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real_sync(descriptor)

    def rename(path: Path, target: Path) -> Path:
        told.append("rename")
        return real_rename(path, target)

    folder = tmp_path / "uno"
    folder.mkdir()
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    Snapshots(folder).save(snapshot_of(1))
    names = ["manifest" if "manifest" in name else name for name in told]
    assert names == ["state.safetensors", "manifest", snapshots.UNFINISHED_SNAPSHOT, "rename", "uno"]


def test_a_full_disk_leaves_the_earlier_ones(tmp_path: Path) -> None:
    """Where a write fails for want of room an OSError comes, the earlier snapshot stays and nothing else does."""
    code = f"""
import resource, signal
from pathlib import Path
from tests.colab.test_snapshots import snapshot_of
from sheily_train.colab.snapshots import Snapshots
store = Snapshots(Path({str(tmp_path)!r}))
store.save(snapshot_of(1))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    store.save(snapshot_of(2))
except OSError as error:
    print(type(error).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "OSError\n"
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot-000000000001"]


@pytest.mark.parametrize("spare", [0, 8])
def test_a_header_is_bounded(spare: int) -> None:
    """A header as long as the limit is read; one that is longer is refused though it is otherwise good."""
    content = pack_snapshot(snapshot_of(1))
    size = int.from_bytes(content[:8], "little")
    wanted = snapshots.MAX_SNAPSHOT_HEADER + spare
    padded = wanted.to_bytes(8, "little") + content[8 : 8 + size].ljust(wanted) + content[8 + size :]
    if spare:
        with pytest.raises(RefusedError, match="estado entero"):
            unpack_snapshot(padded)
    else:
        assert unpack_snapshot(padded).seq == 1


@settings(deadline=None)
@given(st.binary(max_size=400) | st.binary(max_size=200).map(lambda tail: pack_snapshot(snapshot_of(1))[:-9] + tail))
def test_any_other_bytes_are_refused(content: bytes) -> None:
    """Bytes that are no snapshot raise RefusedError and nothing else."""
    try:
        unpack_snapshot(content)
    except RefusedError:
        return
    assert content[:8] == pack_snapshot(snapshot_of(1))[:8]


@settings(deadline=None)
@given(st.integers(0, 299), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_read(place: int, change: int) -> None:
    """A byte changed anywhere raises RefusedError and nothing else, or gives a snapshot."""
    content = bytearray(pack_snapshot(snapshot_of(1)))
    content[place % len(content)] ^= change
    try:
        found = unpack_snapshot(bytes(content))
    except RefusedError:
        return
    assert isinstance(found.seq, int)


NUMBERS = st.sampled_from([-1, 0, 1, 4, 6400, 2**31, 2**63, 2**64 - 1, 2**64, 1.5, None, "1"])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(
            ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E5M2", "F4", "C64", "Q9", ""]
        ),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=3),
    }
)
FACTS = st.sampled_from(
    ["{}", "[]", "null", "", '{"seq": 1}', '{"seq": 1e999}', '{"seq": -1}', '{"seq": true}', "[" * 2000]
)


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(["weight", "steps", "x", ""]), ENTRIES | st.none() | st.integers()),
    st.fixed_dictionaries({"run": FACTS}) | st.none() | st.integers(),
    st.integers(0, 70),
)
def test_any_header_is_refused_or_read(entries: dict[str, Any], metadata: Any, size: int) -> None:
    """Headers that lie about types, shapes, offsets and facts give a snapshot, or a RefusedError that is a 4xx."""
    text = json.dumps({"__metadata__": metadata, **entries}).encode()
    refused: RefusedError | None = None
    try:
        assert unpack_snapshot(struct.pack("<Q", len(text)) + text + b"\x01" * size).seq == 1
    except RefusedError as error:
        refused = error
    assert refused is None or (400 <= refused.status < 500 and refused.mend)


KNOWN = b'{"__metadata__": {"run": "{\\"seq\\": 1}"}, '
LIES: dict[str, bytes] = {
    "deep": b'{"a":' * 100_000,
    "deep facts": b'{"__metadata__": {"run": "' + b"[" * 100_000 + b'"}}',
    "one name twice": KNOWN + b'"x": %s, "x": %s}',
    "two in one place": KNOWN + b'"x": %s, "y": %s}',
    "a hole between": KNOWN + b'"x": %s, "y": {"dtype": "U8", "shape": [1], "data_offsets": [7, 8]}}',
    "another type": KNOWN + b'"x": {"dtype": "F64", "shape": [4], "data_offsets": [0, 4]}}',
    "another shape": KNOWN + b'"x": {"dtype": "U8", "shape": [5], "data_offsets": [0, 4]}}',
    "a product beyond 64 bits": KNOWN
    + b'"x": {"dtype": "U8", "shape": [4294967296, 4294967296, 4], "data_offsets": [0, 4]}}',
    "too late": b'{"__metadata__": {"run": "{\\"seq\\": 1000000000000}"}, "x": %s}',
    "before the first": b'{"__metadata__": {"run": "{\\"seq\\": -1}"}, "x": %s}',
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie_are_refused(lie: str) -> None:
    """Nesting, names twice, overlaps, holes, other types and shapes, and numbers that name no folder."""
    text = LIES[lie].replace(b"%s", b'{"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}')
    with pytest.raises(RefusedError):
        unpack_snapshot(struct.pack("<Q", len(text)) + text + b"\x01" * (8 if lie == "a hole between" else 4))
