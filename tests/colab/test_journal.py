from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sheily_train.colab.batches import BINARY_FORM
from sheily_train.colab.journal import JOURNAL_FILE, LOCK_FILE, Journal
from sheily_train.colab.protocol import Kind, first_chain, next_chain
from sheily_train.errors import BusyError, DataError, RefusedError, ResourceError

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


def filled(folder: Path, count: int = 4) -> Journal:
    journal = Journal(folder, "uno", 7)
    for number in range(1, count + 1):
        journal.append(Kind.FEEDBACK if number == 3 else Kind.TRAIN, BINARY_FORM, b"body %d" % number * 5000)
    return journal


def half_a_group(journal: Journal) -> None:
    with journal.group():
        journal.answered(1, b"one")
        journal.append(Kind.TRAIN, BINARY_FORM, b"five")
        raise KeyError


def edit(folder: Path, statement: str) -> None:
    with sqlite3.connect(folder / JOURNAL_FILE) as connection:
        connection.execute(statement)
    connection.close()


def test_what_is_written_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    """Events, answers, chain and facts outlive the process."""
    with filled(tmp_path) as journal:
        journal.answered(1, b"one")
        journal.owner, journal.fingerprint, journal.sessions = 5, {"device": "cpu"}, [{"número": 1}]
        before = list(journal.entries())
    with Journal(tmp_path, "uno", 99) as journal:
        assert list(journal.entries()) == before
        assert [entry.answer for entry in before] == [b"one", None, None, None]
        assert (journal.seed, journal.last_seq, journal.answered_seq, journal.pruned_seq) == (7, 4, 1, 0)
        assert (journal.owner, journal.fingerprint, journal.sessions) == (5, {"device": "cpu"}, [{"número": 1}])
        assert [(seq, kind, answer) for seq, kind, answer in journal.answers()] == [(1, Kind.TRAIN, b"one")]
        assert [entry.event.seq for entry in journal.entries(after=2)] == [3, 4]


def test_the_chain_is_that_of_the_protocol(tmp_path: Path) -> None:
    """Each entry's digest and chain follow from run, seed and the events' exact bytes."""
    with filled(tmp_path) as journal:
        chain = first_chain("uno", 7)
        assert journal.chain(0) == chain
        for entry in journal.entries():
            chain = next_chain(chain, entry.event.digest())
            assert (entry.digest, entry.chain) == (entry.event.digest(), chain)
            assert journal.chain(entry.event.seq) == chain


def test_every_write_is_synced(tmp_path: Path) -> None:
    """The database waits for the disk at each commit, and outlives a crash of the machine."""
    with filled(tmp_path) as journal:
        pragmas = [journal._row(f"PRAGMA {name}")[0] for name in ("journal_mode", "synchronous", "user_version")]
        assert pragmas == ["wal", 2, 1]


def test_a_new_run_has_nothing(tmp_path: Path) -> None:
    """An empty journal answers every question."""
    with Journal(tmp_path / "a" / "b", "uno") as journal:
        assert (journal.last_seq, journal.answered_seq, journal.pruned_seq, journal.owner) == (0, 0, 0, 0)
        assert (journal.fingerprint, journal.sessions, list(journal.entries())) == (None, [], [])


def test_a_group_is_all_or_nothing(tmp_path: Path) -> None:
    """An exception inside takes back every write of the group, and the journal goes on."""
    with filled(tmp_path) as journal:
        with pytest.raises(KeyError):
            half_a_group(journal)
        assert (journal.last_seq, journal.answered_seq) == (4, 0)
        with journal.group():
            journal.answered(1, b"one")
            journal.append(Kind.TRAIN, BINARY_FORM, b"five")
        assert (journal.last_seq, journal.answered_seq) == (5, 1)


def test_no_two_events_have_the_same_time(tmp_path: Path) -> None:
    """A clock that stands still or jumps back still gives every event a time of its own, and later ones their hour."""
    moments = [NOON, NOON, NOON - timedelta(hours=3), NOON, NOON + timedelta(days=1)]
    clock = iter(moments)
    with Journal(tmp_path, "uno", clock=lambda: next(clock)) as journal:
        times = [journal.append(Kind.TRAIN, BINARY_FORM, b"x").event.time for _moment in moments]
    found = [(datetime.fromisoformat(time) - NOON) / timedelta(microseconds=1) for time in times]
    assert found == [0, 1, -10800e6, 2, 86400e6]


def test_another_process_is_told_who_is_first(tmp_path: Path) -> None:
    """A journal has one holder; it is free again when that one has closed it or was killed."""
    code = f"""if True:
        import sys, time
        from pathlib import Path
        from sheily_train.colab.journal import Journal
        journal = Journal(Path({str(tmp_path)!r}), "uno")
        print("held", flush=True)
        time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match="uno"):
            Journal(tmp_path, "uno")
    finally:
        process.kill()
        process.communicate()
    Journal(tmp_path, "uno").close()


def test_a_kill_loses_no_event_that_was_returned(tmp_path: Path) -> None:
    """After kill -9 between or within writes, every event that append returned is there, whole, and none is half."""
    code = f"""if True:
        from pathlib import Path
        from sheily_train.colab.journal import Journal
        from sheily_train.colab.protocol import Kind
        journal = Journal(Path({str(tmp_path)!r}), "uno")
        while True:
            entry = journal.append(Kind.TRAIN, "x/y", bytes(50_000))
            print(entry.event.seq, flush=True)
            journal.answered(entry.event.seq, b"answer")
            print(entry.event.seq, flush=True)
    """
    for round_number in range(4):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.02 + 0.013 * round_number)
        process.kill()
        told = process.communicate()[0].split()
        with Journal(tmp_path, "uno") as journal:
            assert journal.last_seq >= int(told[-1])
            assert [entry.event.body for entry in journal.entries()] == [bytes(50_000)] * journal.last_seq
            answered = {seq for seq, _kind, answer in journal.answers() if answer == b"answer"}
            assert answered >= {int(seq) for seq in told if told.count(seq) == 2}


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE bodies SET body = X'00' WHERE seq = 2", "evento 2"),
        ("UPDATE events SET time = '2026-01-01T00:00:00+00:00' WHERE seq = 2", "evento 2"),
        ("UPDATE events SET kind = 'feedback' WHERE seq = 2", "evento 2"),
        ("UPDATE events SET kind = 'trai\u00f1' WHERE seq = 2", "evento 2"),
        ("UPDATE events SET form = 'x' WHERE seq = 2", "evento 2"),
        ("UPDATE events SET digest = 'x' WHERE seq = 2", "evento 2"),
        ("UPDATE events SET chain = 'x' WHERE seq = 2", "evento 2"),
        ("UPDATE events SET answer = X'00' WHERE seq = 2", "evento 2"),
        ("DELETE FROM events WHERE seq = 2", "evento 2"),
        ("DELETE FROM bodies WHERE seq = 2", "evento 2"),
        ("UPDATE facts SET value = '8' WHERE name = 'seed'", "seed"),
        ("PRAGMA user_version = 2", "versión"),
    ],
)
def test_a_damaged_row_is_named(tmp_path: Path, statement: str, named: str) -> None:
    """Whatever changes in an event, its answer or a fact is noticed before it is used."""
    with filled(tmp_path) as journal:
        journal.answered(2, b"two")
    edit(tmp_path, statement)
    with pytest.raises(DataError, match=named), Journal(tmp_path, "uno") as journal:
        list(journal.entries())


def test_a_flipped_bit_on_the_disk_is_noticed(tmp_path: Path) -> None:
    """A bit flipped within a body in the file is found when that event is read; the others are still good."""
    filled(tmp_path).close()
    path = tmp_path / JOURNAL_FILE
    content = bytearray(path.read_bytes())
    content[content.index(b"body 2body 2") + 3] ^= 1
    path.write_bytes(content)
    with Journal(tmp_path, "uno") as journal:
        assert journal.entry(1).event.body.startswith(b"body 1")
        with pytest.raises(DataError, match="evento 2"):
            journal.entry(2)


def test_the_chain_is_checked_where_bodies_are_gone(tmp_path: Path) -> None:
    """A changed digest of an event without a body is found when the journal is opened."""
    with filled(tmp_path) as journal:
        journal.prune(2)
    edit(tmp_path, "UPDATE events SET digest = 'x' WHERE seq = 2")
    with pytest.raises(DataError, match="evento 2"):
        Journal(tmp_path, "uno")


@pytest.mark.parametrize("content", [b"not a database" * 5000, b"SQLite format 3\x00" + b"\xff" * 40000])
def test_a_file_that_is_no_journal_is_refused(tmp_path: Path, content: bytes) -> None:
    """Something else under its name is told from a journal, and left as it is."""
    (tmp_path / JOURNAL_FILE).write_bytes(content)
    with pytest.raises(DataError, match="dañado"):
        Journal(tmp_path, "uno")
    assert (tmp_path / JOURNAL_FILE).read_bytes() == content


def test_another_runs_journal_is_refused(tmp_path: Path) -> None:
    """A folder belongs to one run; a name that can be no folder is refused."""
    filled(tmp_path).close()
    with pytest.raises(DataError, match="«uno», no de «dos»"):
        Journal(tmp_path, "dos")
    with pytest.raises(RefusedError):
        Journal(tmp_path, "../dos")


def test_pruning_drops_bodies_only(tmp_path: Path) -> None:
    """The chain, the answers and the later events stay; a dropped body is not taken for an empty one."""
    with filled(tmp_path) as journal:
        journal.answered(1, b"one")
        chain = journal.chain(4)
        assert journal.body_bytes(1, 3) == 2 * 30_000
        journal.prune(2)
        assert (journal.pruned_seq, journal.last_seq, journal.body_bytes(0, 4)) == (2, 4, 2 * 30_000)
        with pytest.raises(DataError, match="evento 2"):
            journal.entry(2)
    with Journal(tmp_path, "uno") as journal:
        assert (journal.chain(4), journal.pruned_seq, next(journal.answers())[2]) == (chain, 2, b"one")
        assert [entry.event.seq for entry in journal.entries(after=2)] == [3, 4]
        journal.prune(4)
        assert (journal.pruned_seq, journal.append(Kind.TRAIN, "x/y", b"").event.seq) == (4, 5)


def test_what_was_not_applied_can_be_withdrawn(tmp_path: Path) -> None:
    """The last events go, and their numbers are given again; an answered one never goes."""
    with filled(tmp_path) as journal:
        journal.answered(1, b"one")
        journal.withdraw(3)
        entry = journal.append(Kind.TRAIN, "x/y", b"another")
        assert (entry.event.seq, entry.chain) == (3, next_chain(journal.chain(2), entry.digest))
        journal.answered(2, b"two")
        with pytest.raises(ValueError, match="has an answer"):
            journal.withdraw(2)
        assert journal.last_seq == 3


CPU, GPU = {"device": "cpu"}, {"device": "cuda"}


def rebased(folder: Path, seq: int = 2) -> Journal:
    journal = filled(folder)
    journal.fingerprint = CPU
    for number in range(1, 5):
        journal.answered(number, b"answer %d" % number)
    journal.rebase(seq, GPU)
    return journal


@pytest.mark.parametrize("seq", [0, 2, 4])
def test_going_back_changes_what_follows_and_nothing_before(tmp_path: Path, seq: int) -> None:
    """Answers after it are gone, the chain is another from it on, and a journal opened again says the same."""
    with rebased(tmp_path, seq) as journal:
        plain = [first_chain("uno", 7)]
        for entry in journal.entries():
            plain.append(next_chain(plain[-1], entry.digest))
        chains = [journal.chain(number) for number in range(5)]
        same = [chain == other for chain, other in zip(chains, plain, strict=True)]
        assert same == [True] * seq + [False] * (5 - seq)
        assert (journal.answered_seq, journal.last_seq, journal.fingerprint) == (seq, 4, GPU)
        assert journal.chains(seq) == [plain[seq], journal.chain(seq)]
        assert [journal.has_left(number, plain[number]) for number in range(5)] == [not each for each in same]
        assert not journal.has_left(3, "0" * 64)
        assert not journal.has_left(9, plain[4])
        [made] = journal.breaks.made
        assert (made.seq, made.left, made.taken) == (seq, CPU, GPU)
    with Journal(tmp_path, "uno") as journal:
        assert [journal.chain(number) for number in range(5)] == chains
        assert len(list(journal.entries())) == 4
        entry = journal.append(Kind.TRAIN, BINARY_FORM, b"five")
        assert entry.chain == next_chain(chains[4], entry.digest)
        assert journal.breaks.made == (made,)


def test_going_back_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure on the way leaves the journal as it was, in memory and on the disk."""
    with filled(tmp_path) as journal:
        journal.answered(1, b"one")
        before = [journal.chain(number) for number in range(5)]
        monkeypatch.setattr(journal, "_digests", lambda _last: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            journal.rebase(0, GPU)
        assert ([journal.chain(number) for number in range(5)], journal.answered_seq) == (before, 1)
    with Journal(tmp_path, "uno") as journal:
        assert (journal.breaks.made, journal.fingerprint) == ((), None)


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE events SET digest = 'x' WHERE seq = 2", "evento 2"),
        ("UPDATE events SET chain = 'x' WHERE seq = 2", "evento 2"),
        ("UPDATE facts SET value = replace(value, 'cuda', 'cudb') WHERE name = 'breaks'", "breaks"),
        ("DELETE FROM facts WHERE name = 'breaks'", "evento 2"),
    ],
)
def test_damage_to_a_break_is_named(tmp_path: Path, statement: str, named: str) -> None:
    """A break that is changed or gone, or an event beside it, is noticed when the journal is opened."""
    rebased(tmp_path).close()
    edit(tmp_path, statement)
    with pytest.raises(DataError, match=named):
        Journal(tmp_path, "uno")


def test_a_flipped_bit_in_a_break_is_noticed(tmp_path: Path) -> None:
    """So is one flipped on the disk, in the file itself."""
    rebased(tmp_path).close()
    path = tmp_path / JOURNAL_FILE
    content = bytearray(path.read_bytes())
    content[content.index(b'"to": {"device"') + 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="breaks"):
        Journal(tmp_path, "uno")


def test_threads_may_share_it(tmp_path: Path) -> None:
    """Appends of several threads get consecutive numbers, and one chain."""
    with Journal(tmp_path, "uno") as journal:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda _number: journal.append(Kind.TRAIN, "x/y", b"z"), range(40)))
        assert [entry.event.seq for entry in journal.entries()] == list(range(1, 41))


def test_a_full_disk_is_told_and_what_was_written_stays(tmp_path: Path) -> None:
    """A write that finds no room is explained, nothing more is taken after it, and earlier events are whole."""
    code = f"""if True:
        import resource
        from pathlib import Path
        from sheily_train.colab.journal import Journal
        from sheily_train.colab.protocol import Kind
        from sheily_train.errors import ResourceError
        journal = Journal(Path({str(tmp_path)!r}), "uno")
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        for _number in range(20):
            try:
                print(journal.append(Kind.TRAIN, "x/y", bytes(50_000)).event.seq)
            except ResourceError as error:
                print(error.exit_code, error.message)
                break
        try:
            journal.append(Kind.TRAIN, "x/y", b"small")
        except ResourceError as error:
            print(error.message)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *numbers, reason, after = done.stdout.splitlines()
    assert numbers
    assert reason.startswith("5 El diario")
    assert "dejó de poder escribirse" in after
    with Journal(tmp_path, "uno") as journal:
        assert [entry.event.seq for entry in journal.entries()] == [int(number) for number in numbers]


def test_a_folder_that_takes_nothing_is_explained(tmp_path: Path) -> None:
    """Where SQLite cannot open its file, nor the folder or its lock be made, the error says which."""
    (tmp_path / JOURNAL_FILE).mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "locked" / LOCK_FILE).mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "file" / "uno", tmp_path / "locked"):
        with pytest.raises(ResourceError, match=str(folder / JOURNAL_FILE)):
            Journal(folder, "uno")


def test_a_reader_beside_it_can_count_what_waits(tmp_path: Path) -> None:
    """Another process may read, while the journal is held, how many events have no answer."""
    with filled(tmp_path) as journal:
        journal.answered(1, b"one")
        uri = f"{(tmp_path / JOURNAL_FILE).as_uri()}?mode=ro"
        connection = sqlite3.connect(uri, uri=True)
        assert connection.execute("SELECT count(*) FROM events WHERE answer IS NULL").fetchone() == (3,)
        connection.close()
