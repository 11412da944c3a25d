"""The client's journal of one run: every event before it is sent, every answer before it is shown.

``folder/journal.sqlite`` in WAL mode with ``synchronous=FULL``: what a method wrote is on the disk when it returns.
Each event's row has its digest and its chain value (:mod:`sheily_train.colab.protocol`), each answer and each fact its
own sha256, so that a flipped bit is noticed and named, never sent. One process holds a journal at a time; threads may
share it. After a write that failed the journal refuses everything: an ``fsync`` is never tried twice.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from sheily_train import durable
from sheily_train.colab.breaks import Break, Breaks
from sheily_train.colab.protocol import Event, Kind, check_run_id, first_chain, next_chain
from sheily_train.colab.write_ahead_log import hidden_commits
from sheily_train.errors import BusyError, DataError, ResourceError
from sheily_train.i18n import _

JOURNAL_FILE = "journal.sqlite"
LOCK_FILE = "journal.lock"

_VERSION = 1
_PAGE_BYTES = 16384
_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL, sha256 TEXT NOT NULL);
CREATE TABLE events (
    seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, time TEXT NOT NULL UNIQUE, form TEXT NOT NULL,
    digest TEXT NOT NULL, chain TEXT NOT NULL, answer BLOB, answer_sha256 TEXT
);
CREATE INDEX unanswered ON events (seq) WHERE answer IS NULL;
CREATE TABLE bodies (seq INTEGER PRIMARY KEY, body BLOB NOT NULL);
"""
_NOT_TAKEN = {
    *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM),
    *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_TOOBIG),
}
"""SQLite's errors of a disk or machine; after any other one the file is not what was written."""
_COLUMNS = "seq, kind, time, form, digest, chain, answer, answer_sha256"


@dataclass(frozen=True)
class Entry:
    """An event of the journal, with its digest, the chain value after it and, once it came, its answer's bytes."""

    event: Event
    chain: str
    digest: str
    answer: bytes | None = None


class Journal:
    """The journal of one run; created when it is not there.

    Args:
        folder: the run's own folder.
        seed: of a new run. A run that is there keeps its own: see :attr:`seed`.
        clock: gives an event's time. No two events of a run get the same one, so that an answer, which repeats it,
            can be told from every other.

    Attributes:
        lost_its_tail: whether what was written last was not whole: torn by a power cut, and then nobody had been told
            of it, or damaged.

    Raises:
        BusyError: another process has the journal.
        DataError: it is damaged, or it is another run's.
        ResourceError: the disk does not take it.
    """

    def __init__(
        self, folder: Path, run: str, seed: int = 0, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self.folder = folder
        self.run = check_run_id(run)
        self._clock = clock
        self._mutex = threading.RLock()
        self._failed = False
        self._lock = FileLock(folder / LOCK_FILE, thread_local=False)
        try:
            durable.make_folder(folder)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise BusyError(
                _("El entrenamiento «{run}» ya está en marcha en otro proceso.").format(run=run),
                mend=_("Espera a que termine, o usa otro nombre con --run."),
            ) from None
        except OSError as error:
            raise self._not_written(error) from error
        try:
            self._connection = self._open()
            self._begin(seed)
            self.seed: int = self._fact("seed")
            self.breaks = Breaks(map(Break.from_json, self._fact("breaks", [])))
            self._check()
        except BaseException:
            self.close()
            raise

    # What it holds

    @property
    def last_seq(self) -> int:
        """The number of the last event written down; 0 before the first."""
        return self._number("SELECT max(seq) FROM events") or 0

    @property
    def answered_seq(self) -> int:
        """The number up to which every event has its answer."""
        first = self._number("SELECT min(seq) FROM events WHERE answer IS NULL")
        return self.last_seq if first is None else first - 1

    @property
    def pruned_seq(self) -> int:
        """The number up to which bodies were dropped."""
        first = self._number("SELECT min(seq) FROM bodies")
        return self.last_seq if first is None else first - 1

    @property
    def owner(self) -> int:
        """The highest owner's number that a worker gave to this client."""
        return int(self._fact("owner", 0))

    @owner.setter
    def owner(self, value: int) -> None:
        self._set_fact("owner", value)

    @property
    def fingerprint(self) -> dict[str, str] | None:
        """The kind of machine that gave the answers."""
        found: dict[str, str] | None = self._fact("fingerprint")
        return found

    @fingerprint.setter
    def fingerprint(self, value: dict[str, str]) -> None:
        self._set_fact("fingerprint", value)

    @property
    def sessions(self) -> list[Any]:
        """What the caller notes of its sessions: JSON values."""
        found: list[Any] = self._fact("sessions", [])
        return found

    @sessions.setter
    def sessions(self, value: list[Any]) -> None:
        self._set_fact("sessions", value)

    def chain(self, seq: int) -> str:
        """The chain value after event ``seq``; 0 is that of a run without events."""
        if seq == 0:
            return self.chains(0)[-1]
        row = self._row("SELECT chain FROM events WHERE seq = ?", seq)
        if row is None:
            raise self._damaged(seq, _("no está"))
        return str(row[0])

    def chains(self, seq: int) -> list[str]:
        """The chain values after event ``seq``: before its breaks and after each; the last one is :meth:`chain`."""
        if seq == 0:
            return self.breaks.mix(0, first_chain(self.run, self.seed))
        row = self._row("SELECT digest FROM events WHERE seq = ?", seq)
        if row is None:
            raise self._damaged(seq, _("no está"))
        return self.breaks.mix(seq, next_chain(self.chain(seq - 1), row[0]))

    def has_left(self, seq: int, chain: str) -> bool:
        """Whether a chain value is that of a history of this run which a break has left."""
        if seq > self.last_seq or chain == self.chain(seq):
            return False
        first, digests = first_chain(self.run, self.seed), self._digests(seq)
        return any(chain == list(past.walk(first, digests))[-1] for past in self.breaks.earlier())

    def entry(self, seq: int) -> Entry:
        """An event, whole and checked. Raises :class:`DataError` when it is damaged, absent or its body was dropped."""
        row = self._row(f"SELECT {_COLUMNS} FROM events WHERE seq = ?", seq)  # noqa: S608
        body = self._row("SELECT body FROM bodies WHERE seq = ?", seq)
        if row is None or body is None:
            raise self._damaged(seq, _("no está"))
        if not (all(isinstance(text, str) for text in row[1:6]) and isinstance(body[0], bytes)):
            raise self._damaged(seq, _("su contenido no es el que se anotó"))
        event = Event(seq, self._kind(seq, row[1]), row[2], row[3], body[0])
        if event.digest() != row[4] or self.chains(seq)[-1] != row[5]:
            raise self._damaged(seq, _("su contenido no es el que se anotó"))
        return Entry(event, row[5], row[4], self._answer(seq, row[6], row[7]))

    def entries(self, after: int = 0) -> Iterator[Entry]:
        """The events after ``after``, one at a time."""
        seq = after
        while seq < self.last_seq:
            seq += 1
            yield self.entry(seq)

    def answers(self, after: int = 0) -> Iterator[tuple[int, Kind, bytes]]:
        """Number, kind and answer of the events after ``after`` that have one, without reading their bodies."""
        query = f"SELECT {_COLUMNS} FROM events WHERE seq > ? AND answer IS NOT NULL ORDER BY seq LIMIT 1"  # noqa: S608
        while row := self._row(query, after):
            after = row[0]
            yield after, self._kind(after, row[1]), self._answer(after, row[6], row[7]) or b""

    def latest_answers(self, kind: Kind, count: int) -> list[bytes]:
        """The answers of the latest events of a kind that have one, at most so many, the latest last."""
        query = (
            f"SELECT {_COLUMNS} FROM events WHERE seq < ? AND kind = ? AND answer IS NOT NULL "  # noqa: S608
            "ORDER BY seq DESC LIMIT 1"
        )
        found: list[bytes] = []
        before = self.last_seq + 1
        while len(found) < count and (row := self._row(query, before, str(kind))):
            before = row[0]
            found.insert(0, self._answer(before, row[6], row[7]) or b"")
        return found

    def body_bytes(self, after: int, last: int) -> int:
        """How many bytes the bodies after ``after`` up to ``last`` have together."""
        return self._number("SELECT sum(length(body)) FROM bodies WHERE seq > ? AND seq <= ?", after, last) or 0

    # What is written

    @contextmanager
    def group(self) -> Iterator[None]:
        """Make the writes inside one: one fsync, and all of them or none."""
        with self._mutex, self._explained():
            if self._connection.in_transaction:
                yield
                return
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                self._roll_back()
                raise

    def append(self, kind: Kind, form: str, body: bytes) -> Entry:
        """Write down the next event."""
        with self.group():
            seq = self.last_seq + 1
            event = Event(seq, kind, self._new_time(), form, body)
            digest = event.digest()
            entry = Entry(event, next_chain(self.chain(seq - 1), digest), digest)
            self._run(
                f"INSERT INTO events ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, NULL, NULL)",  # noqa: S608
                *(seq, str(kind), event.time, form, digest, entry.chain),
            )
            self._run("INSERT INTO bodies VALUES (?, ?)", seq, body)
        return entry

    def answered(self, seq: int, answer: bytes) -> None:
        """Write down an event's answer."""
        with self.group():
            self._run("UPDATE events SET answer = ?, answer_sha256 = ? WHERE seq = ?", answer, _sha256(answer), seq)

    def prune(self, seq: int) -> None:
        """Drop the bodies up to ``seq``; numbers, digests, chain and answers stay."""
        with self.group():
            self._run("DELETE FROM bodies WHERE seq <= ?", seq)

    def withdraw(self, seq: int) -> None:
        """Take back the events from ``seq`` on, which no worker has applied. None of them may have an answer."""
        with self.group():
            if self.answered_seq >= seq:
                raise ValueError(f"event {seq} has an answer")
            self._run("DELETE FROM events WHERE seq >= ?", seq)
            self._run("DELETE FROM bodies WHERE seq >= ?", seq)

    def rebase(self, seq: int, fingerprint: dict[str, str]) -> Break:
        """Go back to the state after event ``seq``, to go on from it with the numbers of another machine.

        The answers after it are dropped, the break is noted, and the chain changes from ``seq`` on: all or nothing.
        """
        with self.group():
            made = Break(seq, self.fingerprint or {}, fingerprint, self._clock().isoformat(timespec="microseconds"))
            breaks = Breaks([*self.breaks.made, made])
            self._set_fact("breaks", [each.to_json() for each in breaks.made])
            self._set_fact("fingerprint", fingerprint)
            self._run("UPDATE events SET answer = NULL, answer_sha256 = NULL WHERE seq > ?", seq)
            chains = enumerate(breaks.walk(first_chain(self.run, self.seed), self._digests(self.last_seq)))
            changed = [(chain, number) for number, chain in chains if number >= max(seq, 1)]
            self._connection.executemany("UPDATE events SET chain = ? WHERE seq = ?", changed)
        self.breaks = breaks
        return made

    def close(self) -> None:
        """Close the file and let go of it. Again: nothing."""
        with self._mutex:
            if hasattr(self, "_connection"):
                self._connection.close()
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Inside

    def _open(self) -> sqlite3.Connection:
        path = self.folder / JOURNAL_FILE
        with self._explained():
            log = path.with_name(f"{path.name}-wal")
            hidden = hidden_commits(log, _PAGE_BYTES)
            self.lost_its_tail = hidden == 1
            if hidden > 1:
                text = _("en {log} hay un dato dañado, y lo que se anotó después, {count} veces, no se puede leer")
                raise self._damaged(0, text.format(log=log.name, count=hidden))
            connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
            try:
                connection.execute(f"PRAGMA page_size={_PAGE_BYTES}")
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=FULL")
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # nothing torn stays in the log
            except BaseException:
                connection.close()
                raise
            return connection

    def _begin(self, seed: int) -> None:
        """Make the tables of a new journal, and know that they are this run's."""
        version = self._number("PRAGMA user_version")
        if version not in (0, _VERSION):
            raise self._damaged(0, _("es de otra versión del programa"))
        if version == 0:
            with self.group():
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    self._run(statement)
                self._set_fact("run", self.run)
                self._set_fact("seed", seed)
                self._run(f"PRAGMA user_version={_VERSION}")
            durable.sync_folder(self.folder)
            durable.sync_folder(self.folder.parent)
        self._check_tables()
        if (found := self._fact("run")) != self.run:
            raise DataError(
                _("El diario de {folder} es de «{found}», no de «{run}».").format(
                    folder=self.folder, found=found, run=self.run
                ),
                mend=_("Usa --run {found}, u otra carpeta.").format(found=found),
            )

    def _check_tables(self) -> None:
        """Know that tables and indexes say the same; the bodies, which are long, are checked when they are read."""
        for table in ("facts", "events"):
            [found] = self._row(f"PRAGMA integrity_check({table})")
            if found != "ok":
                raise self._damaged(0, " ".join(str(found).split()))

    def _check(self) -> None:
        """Walk along the chain."""
        with self._explained():
            seq, chain = 0, self.chain(0)
            for found, digest, stored in self._connection.execute("SELECT seq, digest, chain FROM events ORDER BY seq"):
                seq, chain = seq + 1, self.breaks.mix(seq + 1, next_chain(chain, digest))[-1]
                if (found, stored) != (seq, chain):
                    raise self._damaged(seq, _("no encaja con los anteriores"))

    def _digests(self, last: int) -> list[str]:
        """The digests of the events up to ``last``."""
        with self._mutex, self._explained():
            rows = self._connection.execute("SELECT digest FROM events WHERE seq <= ? ORDER BY seq", (last,)).fetchall()
        return [row[0] for row in rows]

    def _roll_back(self) -> None:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def _new_time(self) -> str:
        moment = self._clock()
        while self._row("SELECT 1 FROM events WHERE time = ?", text := moment.isoformat(timespec="microseconds")):
            moment += timedelta(microseconds=1)
        return text

    def _fact(self, name: str, default: Any = None) -> Any:
        row = self._row("SELECT value, sha256 FROM facts WHERE name = ?", name)
        if row is None:
            return default
        if _sha256(f"{name}={row[0]}".encode()) != row[1]:
            raise self._damaged(0, _("el dato «{name}» no es el que se anotó").format(name=name))
        return json.loads(row[0])

    def _set_fact(self, name: str, value: Any) -> None:
        text = json.dumps(value, ensure_ascii=False)
        with self.group():
            self._run("INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", name, text, _sha256(f"{name}={text}".encode()))

    def _kind(self, seq: int, text: str) -> Kind:
        try:
            return Kind(text)
        except ValueError:
            raise self._damaged(seq, _("su contenido no es el que se anotó")) from None

    def _answer(self, seq: int, answer: bytes | None, sha256: str | None) -> bytes | None:
        if answer is not None and not (isinstance(answer, bytes) and _sha256(answer) == sha256):
            raise self._damaged(seq, _("su respuesta no es la que se anotó"))
        return answer

    def _run(self, statement: str, *values: Any) -> None:
        self._connection.execute(statement, values)

    def _row(self, query: str, *values: Any) -> Any:
        with self._mutex, self._explained():
            return self._connection.execute(query, values).fetchone()

    def _number(self, query: str, *values: Any) -> int | None:
        found: int | None = self._row(query, *values)[0]
        return found

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say what SQLite's errors mean; after one of them nothing more is read or written."""
        if self._failed:
            raise ResourceError(_("El diario dejó de poder escribirse."), mend=_("Repite la orden."))
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:  # what is no text may stand in an error's own text, too
            self._failed = True
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
            if code not in _NOT_TAKEN and not isinstance(error, sqlite3.ProgrammingError):
                raise self._damaged(0, str(error)) from error
            raise self._not_written(error) from error

    def _not_written(self, reason: Exception) -> ResourceError:
        return ResourceError(
            _("El diario {file} no se puede escribir: {reason}.").format(
                file=self.folder / JOURNAL_FILE, reason=reason
            ),
            mend=_("Comprueba el sitio libre y los permisos, y repite la orden: sigue donde estaba."),
        )

    def _damaged(self, seq: int, reason: str) -> DataError:
        where = _("evento {seq}: ").format(seq=seq) if seq else ""
        return DataError(
            _("El diario {file} está dañado: {where}{reason}.").format(
                file=self.folder / JOURNAL_FILE, where=where, reason=reason
            ),
            mend=_("Recupera la carpeta de una copia, o apártala y empieza otro entrenamiento."),
        )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
