from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from sheily_train.colab.batches import BINARY_FORM
from sheily_train.colab.journal import JOURNAL_FILE, Journal
from sheily_train.colab.protocol import Kind
from sheily_train.errors import DataError

FLIPS = 250
NAMES = (b"owner", b"fingerprint", b"CREATE TABLE events", b"answer_sha256", b"train", b"+00:00")


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small journal with something of everything in it."""
    folder = tmp_path_factory.mktemp("journal") / "desk"
    with Journal(folder, "uno", 7) as journal:
        for number in range(1, 5):
            journal.append(Kind.TRAIN, BINARY_FORM, b"body %d" % number * 400)
            journal.answered(number, b"answer" * 20)
        journal.owner, journal.fingerprint = 3, {"device": "cpu"}
    return folder


def all_of(folder: Path) -> list[Any]:
    with Journal(folder, "uno") as journal:
        found = [list(journal.entries()), list(journal.answers()), journal.seed, journal.owner, journal.fingerprint]
        return [*found, journal.sessions, journal.last_seq, journal.answered_seq, journal.pruned_seq]


def places(content: bytes) -> list[tuple[int, int]]:
    """Where bits flip: in the file's head, in the names of things, and anywhere that is not empty."""
    chance = random.Random(3)
    head = [(place, chance.randrange(8)) for place in range(100)] + [(47, 0), (63, 0)]
    named = [
        (place + chance.randrange(len(name)), chance.choice((0, 1, 5, 7)))
        for name in NAMES
        for place in range(len(content))
        if content.startswith(name, place)
    ]
    used = [place for place, byte in enumerate(content) if byte]
    return [*head, *named[:60], *((chance.choice(used), chance.randrange(8)) for _flip in range(FLIPS))]


def test_a_bit_that_flips_has_no_effect_or_is_named(tmp_path: Path, journal: Path) -> None:
    """Wherever one bit of a journal flips, all that it says is as before, or it is refused as damaged: never is
    something else read out of it, and never is it called a full disk or a defect of the program."""
    content, whole = (journal / JOURNAL_FILE).read_bytes(), all_of(journal)
    named: list[str] = []
    for place, bit in places(content):
        folder = tmp_path / f"{place}-{bit}"
        folder.mkdir(exist_ok=True)
        (folder / JOURNAL_FILE).write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        try:
            assert all_of(folder) == whole, (place, bit)
        except DataError as error:
            named.append(error.message)
        shutil.rmtree(folder)
    assert len(named) > FLIPS / 2
    assert all(f"{JOURNAL_FILE} está dañado" in message for message in named)
