from __future__ import annotations

import random
import shutil
import sqlite3
from pathlib import Path

import pytest

from sheily_train.colab.batches import BINARY_FORM
from sheily_train.colab.journal import JOURNAL_FILE, Journal
from sheily_train.colab.protocol import Kind
from sheily_train.colab.write_ahead_log import hidden_commits
from sheily_train.errors import DataError

COMMITS = 20
PAGE = 4096
LOG = f"{JOURNAL_FILE}-wal"


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a database as a kill leaves it: twenty rows, each a commit, all of them in the log."""
    folder, chance = tmp_path_factory.mktemp("killed"), random.Random(1)
    connection = sqlite3.connect(folder / "open", isolation_level=None)
    connection.execute(f"PRAGMA page_size={PAGE}")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE row (content BLOB)")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for _row in range(COMMITS):
        connection.execute("INSERT INTO row VALUES (?)", (chance.randbytes(chance.randrange(10_000)),))
    for name in ("", "-wal"):
        shutil.copy(folder / f"open{name}", folder / f"database{name}")
    connection.close()
    return folder


def rows(database: Path) -> int:
    """How many rows SQLite finds."""
    connection = sqlite3.connect(database)
    [(count,)] = connection.execute("SELECT count(*) FROM row")
    connection.close()
    return int(count)


def flipped(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def test_what_sqlite_would_drop_is_counted(tmp_path: Path, killed: Path) -> None:
    """Wherever a bit of the log flips, the commits that SQLite then drops without a word are those that are counted."""
    content, chance = (killed / "database-wal").read_bytes(), random.Random(2)
    places = [*range(0, 56), *(chance.randrange(len(content)) for _place in range(60)), len(content) - 1]
    dropped = set()
    for place in places:
        shutil.copy(killed / "database", tmp_path / "database")
        (tmp_path / "database-wal").write_bytes(flipped(content, place, chance.randrange(8)))
        hidden = hidden_commits(tmp_path / "database-wal", PAGE)
        assert rows(tmp_path / "database") == COMMITS - hidden, place
        dropped.add(hidden)
    assert min(dropped) == 1
    assert max(dropped) == COMMITS


def test_a_whole_log_hides_nothing(tmp_path: Path, killed: Path) -> None:
    """A log as a kill leaves it, an empty one and none at all are in order; a torn end is at most one commit."""
    content = (killed / "database-wal").read_bytes()
    log = tmp_path / "database-wal"
    assert hidden_commits(log, PAGE) == 0
    for end, hidden in ((len(content), 0), (len(content) - 1, 0), (0, 0), (40, 0)):
        log.write_bytes(content[:end])
        assert hidden_commits(log, PAGE) == hidden
    log.write_bytes(content[:-PAGE] + bytes(PAGE))  # the last page was not on the disk yet, its frame's head was
    assert hidden_commits(log, PAGE) == 1


def killed_journal(folder: Path, copy: Path) -> None:
    """What a kill leaves of a journal."""
    with Journal(folder, "uno") as journal:
        for number in range(1, 7):
            journal.append(Kind.TRAIN, BINARY_FORM, b"body %d" % number * 5000)
            journal.answered(number, b"answer")
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.lock", "*-shm"))


def test_a_journal_that_would_lose_events_is_refused_each_time(tmp_path: Path) -> None:
    """A bit that flips in a killed process's log takes no event away in silence: the journal is refused, and stays as
    it is, until a copy is put in its place."""
    killed_journal(tmp_path / "desk", tmp_path / "killed")
    log = tmp_path / "killed" / LOG
    content = log.read_bytes()
    log.write_bytes(flipped(content, len(content) // 2, 3))
    for _time in range(2):
        with pytest.raises(DataError, match=f"{JOURNAL_FILE} está dañado: en {LOG} hay un dato dañado") as raised:
            Journal(tmp_path / "killed", "uno")
        assert "Recupera la carpeta" in raised.value.mend
    log.write_bytes(content)
    with Journal(tmp_path / "killed", "uno") as journal:
        assert (journal.last_seq, journal.answered_seq) == (6, 6)


def test_a_torn_last_write_is_no_damage(tmp_path: Path) -> None:
    """What a power cut may tear, the write that nobody was told of yet, is gone without a complaint, and only that."""
    killed_journal(tmp_path / "desk", tmp_path / "killed")
    log = tmp_path / "killed" / LOG
    content = log.read_bytes()
    log.write_bytes(content[:-100] + bytes(100))
    with Journal(tmp_path / "killed", "uno") as journal:
        assert (journal.last_seq, journal.answered_seq) == (6, 5)
        assert log.stat().st_size == 0
