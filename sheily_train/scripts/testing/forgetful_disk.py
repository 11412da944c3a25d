"""A disk that forgets what was not synced, under real code that writes real files.

A :class:`ForgetfulDisk` is a folder. While :func:`watched` is in force, every ``os.fsync`` below it notes what is
durable from then on: a file's content, a folder's entries. A crash makes a new disk of what would be found after it:

    kill        what was written is there: the page cache outlives a process
    power cut   of each folder either the entries at its last sync or the latest ones; of each file whose content was
                not synced the synced content, the latest, or a torn piece of it

SQLite syncs below Python, so a database counts by transactions: a commit under ``synchronous=FULL`` is durable, one
under less may be lost with those after it. The level is read from the connection itself.

A crash can be armed to happen at the n-th sync, just before or just after it; :class:`Crash` then flies through the
code. Linux only.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

_FULL = 2
_DATABASE = ".sqlite"
_BESIDE_A_DATABASE = ("-wal", "-shm")
_Entries = dict[str, tuple[int, bool]]
"""A folder's content: names with inode number and whether it is a folder."""
_disks: list[ForgetfulDisk] = []


class Crash(BaseException):
    """The machine died here. Not an :class:`Exception`: nothing may catch it and go on."""


@dataclass
class _Content:
    """Of a file or a database: what is durable, and what was last written."""

    durable: bytes = b""
    latest: bytes = b""


@dataclass
class _Tree:
    """Folders and files by inode, as they are now."""

    folders: dict[int, _Entries] = field(default_factory=dict)
    files: dict[int, bytes] = field(default_factory=dict)


class ForgetfulDisk:
    """A folder and what of it is durable.

    Args:
        root: created; must not exist.
        chance: decides what a power cut leaves.
    """

    def __init__(self, root: Path, chance: Random) -> None:
        root.mkdir(parents=True)
        self.root = root
        self.dead = False
        self.full = False
        self.syncs = 0
        self.on_crash: Callable[[], None] = lambda: None
        self._chance = chance
        self._armed: tuple[int, str, bool] | None = None
        self._files: dict[int, bytes] = {}
        self._folders: dict[int, _Entries] = {}
        self._databases: dict[str, _Content] = {}
        self._held: list[int] = []
        self._survivors: Callable[[Path], None] | None = None
        _disks.append(self)

    def arm(self, syncs: int, moment: str, *, power: bool) -> None:
        """Crash ``before`` or ``after`` the sync that is ``syncs`` syncs away."""
        self._armed = self.syncs + syncs, moment, power

    def crash(self, *, power: bool) -> None:
        """Die now; nothing that is synced later counts."""
        if not self.dead:
            self._survivors = self._remember(power)
            self.dead = True
            self.on_crash()

    def restore(self, root: Path) -> ForgetfulDisk:
        """A new disk with what the crash left; all of it durable."""
        assert self._survivors is not None  # noqa: S101
        disk = ForgetfulDisk(root, self._chance)
        self._survivors(root)
        disk.settle()
        return disk

    def copy_to(self, other: ForgetfulDisk) -> None:
        """Write what is here now onto another disk, all of it durable there."""
        self._remember(power=False)(other.root)
        other.settle()

    def settle(self) -> None:
        """Everything that is there is durable."""
        for folder, _names, files in os.walk(self.root):
            self._sync_path(Path(folder))
            for name in files:
                path = Path(folder, name)
                self._sync_path(path)
                if name.endswith(_DATABASE):
                    self._databases[str(path)] = _Content(path.read_bytes(), path.read_bytes())

    def close(self) -> None:
        """Let go of the files."""
        for descriptor in self._held:
            os.close(descriptor)
        self._held.clear()
        if self in _disks:
            _disks.remove(self)

    # What is told of

    def synced(self, descriptor: int) -> None:
        """A file's content, or a folder's entries, are durable."""
        with self._sync_point(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))):
            number = os.fstat(descriptor).st_ino
            self._held.append(os.dup(descriptor))  # so that no other file gets its inode number
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                self._folders[number] = _entries(descriptor)
            else:
                self._files[number] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def committed(self, path: str, connection: sqlite3.Connection, commit: Callable[[], Any]) -> Any:
        """A transaction of a database is about to end."""
        failure = sqlite3.OperationalError("database or disk is full")
        failure.sqlite_errorcode = sqlite3.SQLITE_FULL
        with self._sync_point(failure):
            result = commit()
            content = self._databases.setdefault(path, _Content())
            content.latest = connection.serialize()
            if connection.execute("PRAGMA synchronous").fetchone()[0] >= _FULL:
                content.durable = content.latest
            return result

    @contextmanager
    def _sync_point(self, failure: Exception) -> Iterator[None]:
        self._pass("before")
        if self.full:
            raise failure
        self.syncs += 1
        yield
        self._pass("after")

    def _pass(self, moment: str) -> None:
        if self._armed is not None and not self.dead:
            syncs, wanted, power = self._armed
            if moment == wanted and self.syncs + (moment == "before") >= syncs:
                self.crash(power=power)
        if self.dead:
            raise Crash

    def _sync_path(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            self.synced(descriptor)
        finally:
            os.close(descriptor)

    # What a crash leaves

    def _remember(self, power: bool) -> Callable[[Path], None]:
        """A function that writes what is left into a folder."""
        tree = _Tree()
        _read_tree(self.root, tree)
        plan: list[tuple[str, bytes | None]] = []
        self._list_survivors(os.stat(self.root).st_ino, "", tree, power, plan)  # noqa: PTH116

        def write(root: Path) -> None:
            for name, content in plan:
                if content is None:
                    (root / name).mkdir()
                else:
                    (root / name).write_bytes(content)

        return write

    def _list_survivors(
        self, number: int, prefix: str, tree: _Tree, power: bool, plan: list[tuple[str, bytes | None]]
    ) -> None:
        now, synced = tree.folders.get(number), self._folders.get(number, {})
        entries = synced if now is None or (power and self._chance.random() < 0.5) else now
        for name in sorted(entries):
            (child, is_folder), path = entries[name], prefix + name
            if is_folder:
                plan.append((path, None))
                self._list_survivors(child, path + "/", tree, power, plan)
            elif not name.endswith(_BESIDE_A_DATABASE):
                plan.append((path, self._left_of(child, str(self.root / path), tree, power)))

    def _left_of(self, number: int, path: str, tree: _Tree, power: bool) -> bytes:
        if path in self._databases:
            database = self._databases[path]
            return self._chance.choice([database.latest, database.durable]) if power else database.latest
        durable = self._files.get(number, b"")
        latest = tree.files.get(number, durable)
        if not power or latest == durable:
            return latest
        torn = latest[: self._chance.randrange(len(latest) + 1)]
        return self._chance.choice([durable, latest, torn, torn.ljust(len(latest), b"\0")])


def _entries(folder: int | Path) -> _Entries:
    with os.scandir(folder) as found:
        return {entry.name: (entry.inode(), entry.is_dir()) for entry in found}


def _read_tree(folder: Path, tree: _Tree) -> None:
    tree.folders[folder.stat().st_ino] = _entries(folder)
    with os.scandir(folder) as found:
        for entry in found:
            if entry.is_dir():
                _read_tree(Path(entry.path), tree)
            elif not entry.name.endswith((_DATABASE, *_BESIDE_A_DATABASE)):
                tree.files[entry.inode()] = Path(entry.path).read_bytes()


class _WatchedConnection(sqlite3.Connection):
    """A connection that tells its disk of every commit."""

    path = ""

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        disk = _disk_of(self.path) if sql == "COMMIT" else None
        if disk is None:
            return super().execute(sql, parameters)
        cursor: sqlite3.Cursor = disk.committed(self.path, self, lambda: super(_WatchedConnection, self).execute(sql))
        return cursor


@contextmanager
def watched() -> Iterator[None]:
    """See every ``os.fsync`` and every commit of this process; none of them reaches a real disk meanwhile."""
    fsync, connect = os.fsync, sqlite3.connect

    def watched_fsync(descriptor: int) -> None:
        disk = _disk_of(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115
        if disk is None:
            fsync(descriptor)
        else:
            disk.synced(descriptor)

    def watched_connect(path: Any, *arguments: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(path, *arguments, factory=_WatchedConnection, **options)
        connection.path = str(path)  # type: ignore[attr-defined]
        return connection

    os.fsync, sqlite3.connect = watched_fsync, watched_connect  # type: ignore[assignment]
    try:
        yield
    finally:
        os.fsync, sqlite3.connect = fsync, connect
        for disk in list(_disks):
            disk.close()


def _disk_of(path: str) -> ForgetfulDisk | None:
    return next((disk for disk in reversed(_disks) if path.startswith(f"{disk.root}/") or path == str(disk.root)), None)
