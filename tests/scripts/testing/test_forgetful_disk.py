from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from sheily_train import durable
from sheily_train.scripts.testing.forgetful_disk import Crash, ForgetfulDisk, watched


@pytest.fixture(autouse=True)
def watching() -> Iterator[None]:
    with watched():
        yield


@pytest.fixture
def disk(tmp_path: Path) -> ForgetfulDisk:
    return ForgetfulDisk(tmp_path / "disk", Random(0))


def left(disk: ForgetfulDisk, tmp_path: Path, *, power: bool) -> dict[str, bytes]:
    """What a crash leaves of the files."""
    disk.crash(power=power)
    after = disk.restore(tmp_path / "after")
    return {path.name: path.read_bytes() for path in after.root.rglob("*") if path.is_file()}


def outcomes(tmp_path: Path, write: object, tries: int = 60) -> set[tuple[tuple[str, bytes], ...]]:
    """All that power cuts left of the same writes."""
    found = set()
    for seed in range(tries):
        disk = ForgetfulDisk(tmp_path / f"disk-{seed}", Random(seed))
        write(disk.root)  # type: ignore[operator]
        found.add(tuple(sorted(left(disk, tmp_path / f"{seed}", power=True).items())))
    return found


def test_a_kill_forgets_nothing(disk: ForgetfulDisk, tmp_path: Path) -> None:
    """What was written is there after a kill, synced or not."""
    (disk.root / "a").write_bytes(b"written")
    assert left(disk, tmp_path, power=False) == {"a": b"written"}


def test_a_power_cut_forgets_what_was_not_synced(tmp_path: Path) -> None:
    """A file without a sync may be gone, empty, torn or whole."""
    found = outcomes(tmp_path, lambda root: (root / "a").write_bytes(b"0123456789"))
    assert () in found
    assert (("a", b"0123456789"),) in found
    assert (("a", b""),) in found
    assert any(files and 0 < len(files[0][1].rstrip(b"\0")) < 10 for files in found)


def test_what_was_synced_stays(tmp_path: Path) -> None:
    """After the sync of a file and of its folder no power cut takes it away; a later, unsynced content may be lost."""

    def write(root: Path) -> None:
        durable.write_bytes(root / "a", b"first")
        (root / "a").write_bytes(b"second")

    found = outcomes(tmp_path, write)
    assert {len(files) for files in found} == {1}
    assert {b"first", b"second"} <= {files[0][1] for files in found}


def test_a_rename_needs_the_folders_sync(tmp_path: Path) -> None:
    """A synced file under its new name is there for sure only after the folder was synced."""

    def rename(root: Path, *, sync: bool) -> None:
        durable.write_bytes(root / "old", b"content")
        (root / "old").rename(root / "new")
        if sync:
            durable.sync_folder(root)

    both = {(("new", b"content"),), (("old", b"content"),)}
    assert outcomes(tmp_path / "1", lambda root: rename(root, sync=False)) == both
    assert outcomes(tmp_path / "2", lambda root: rename(root, sync=True)) == {(("new", b"content"),)}


def test_a_file_in_new_folders_stays(tmp_path: Path) -> None:
    """What durable writes into folders that it makes outlives a power cut; in folders that nobody synced it may not."""
    assert outcomes(tmp_path / "1", lambda root: durable.write_bytes(root / "a" / "b" / "c", b"content")) == {
        (("c", b"content"),)
    }

    def unsynced(root: Path) -> None:
        (root / "a" / "b").mkdir(parents=True)
        durable.write_bytes(root / "a" / "b" / "c", b"content")

    assert outcomes(tmp_path / "2", unsynced) == {(("c", b"content"),), ()}


@pytest.mark.parametrize(("level", "kept"), [("FULL", {2}), ("OFF", {0, 2})])
def test_a_commit_is_durable_when_sqlite_syncs_it(tmp_path: Path, level: str, kept: set[int]) -> None:
    """Commits under FULL outlive a power cut, those under OFF may be lost; what was not committed is always lost."""
    counts = set()
    for seed in range(20):
        disk = ForgetfulDisk(tmp_path / f"disk-{seed}", Random(seed))
        connection = sqlite3.connect(disk.root / "a.sqlite", isolation_level=None)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={level}")
        for statement in ("CREATE TABLE t (x)", "INSERT INTO t VALUES (1), (2)"):
            connection.execute("BEGIN")
            connection.execute(statement)
            connection.execute("COMMIT")
        durable.sync_folder(disk.root)
        connection.execute("BEGIN")
        connection.execute("INSERT INTO t VALUES (3)")
        disk.crash(power=True)
        connection.close()
        after = sqlite3.connect(disk.restore(tmp_path / f"after-{seed}").root / "a.sqlite")
        tables = after.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        counts.add(after.execute("SELECT count(*) FROM t").fetchone()[0] if tables else 0)
        after.close()
    assert counts == kept


@pytest.mark.parametrize(("moment", "content"), [("before", b"old"), ("after", b"new")])
def test_a_crash_at_a_sync(disk: ForgetfulDisk, tmp_path: Path, moment: str, content: bytes) -> None:
    """A crash that is armed flies through the code at that sync, and whatever syncs later dies as well."""
    died: list[bool] = []
    durable.write_bytes(disk.root / "a", b"old")
    disk.on_crash = lambda: died.append(True)
    disk.arm(2, moment, power=True)  # the second sync is the folder's: only then is the new content sure to be there
    with pytest.raises(Crash):
        durable.write_bytes(disk.root / "a", b"new")
    with pytest.raises(Crash):
        durable.sync_folder(disk.root)
    assert died == [True]
    files = {path.read_bytes() for path in disk.restore(tmp_path / "after").root.iterdir() if path.name == "a"}
    assert files == {content} if moment == "after" else files <= {b"old", b"new"}


def test_a_full_disk_refuses(disk: ForgetfulDisk) -> None:
    """A full disk fails a sync as the system does, and serves again when there is room."""
    disk.full = True
    with pytest.raises(OSError, match="No space left"):
        durable.write_bytes(disk.root / "a", b"new")
    assert not (disk.root / "a").exists()
    disk.full = False
    durable.write_bytes(disk.root / "a", b"new")


def test_elsewhere_syncs_are_real(tmp_path: Path) -> None:
    """A file outside every disk is synced by the system."""
    with (tmp_path / "a").open("wb") as file:
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
    assert (tmp_path / "a").read_bytes() == b"x"
