from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheily_train.colab import protocol
from sheily_train.colab.protocol import Claim, Event, Kind, Ledger, check_run_id, first_chain, next_chain
from sheily_train.errors import RefusedError

TIME = "2026-01-31T12:00:00.123456+00:00"


def event(seq: int, body: bytes = b"body", kind: Kind = Kind.TRAIN) -> Event:
    return Event(seq, kind, TIME, "application/json", body)


def claim_next(ledger: Ledger, body: bytes = b"body") -> Claim:
    made = event(ledger.last_seq + 1, body)
    return Claim(ledger.run, made.seq, ledger.owner, TIME, made.digest(), next_chain(ledger.chain, made.digest()))


def ledger_with(count: int) -> tuple[Ledger, list[Claim]]:
    ledger = Ledger("uno", 7)
    ledger.attach(0)
    claims = []
    for number in range(count):
        claims.append(claim_next(ledger, str(number).encode()))
        assert ledger.judge(claims[-1]) is None
        ledger.record(claims[-1], f"answer {number + 1}".encode())
    return ledger, claims


def code_of(ledger: Ledger, claim: Claim) -> str:
    with pytest.raises(RefusedError) as caught:
        ledger.judge(claim)
    return caught.value.code


def test_the_digest_covers_everything_that_decides_an_answer() -> None:
    """Kind, time, form and body change the digest; the number does not: the chain holds it."""
    base = event(1)
    others = [
        replace(base, kind=Kind.FEEDBACK),
        replace(base, time="2026-01-31T12:00:01Z"),
        replace(base, form="application/x-safetensors"),
        replace(base, body=b"bodY"),
        replace(base, form=base.form + "b", body=b"ody"),
    ]
    assert len({base.digest(), *(other.digest() for other in others)}) == 6
    assert replace(base, seq=2).digest() == base.digest()


def test_the_digest_is_fixed() -> None:
    """The digest and the chain are those of protocol 1 for ever: journals are read by later versions."""
    parts = (b"train", TIME.encode(), b"application/json", b"body")
    expected = hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).hexdigest()
    assert event(1).digest() == expected
    parts = (b"sheily-omega-1", b"uno", b"7")
    expected = hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).hexdigest()
    assert first_chain("uno", 7) == expected


def test_the_chain_differs_by_run_seed_and_order() -> None:
    """Runs, seeds and orders of events give different chains."""
    one, two = event(1, b"1").digest(), event(2, b"2").digest()
    start = first_chain("uno", 7)
    assert len({start, first_chain("uno", 8), first_chain("dos", 7)}) == 3
    assert next_chain(next_chain(start, one), two) != next_chain(next_chain(start, two), one)


def test_a_claim_travels_in_headers() -> None:
    """A claim read from its own headers is the same claim; without a run there is none."""
    claim = claim_next(ledger_with(3)[0])
    assert Claim.from_headers(claim.headers()) == claim
    assert Claim.from_headers({}) is None
    assert Claim.from_headers({protocol.SEQ_HEADER: "1"}) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (protocol.RUN_HEADER, "../x"),
        (protocol.RUN_HEADER, ""),
        (protocol.SEQ_HEADER, "0"),
        (protocol.SEQ_HEADER, "-1"),
        (protocol.SEQ_HEADER, "1e3"),
        (protocol.SEQ_HEADER, "٣"),
        (protocol.SEQ_HEADER, "9" * 16),
        (protocol.OWNER_HEADER, None),
        (protocol.TIME_HEADER, "yesterday"),
        (protocol.TIME_HEADER, "2026-01-31T12:00:00"),
        (protocol.DIGEST_HEADER, "0" * 63),
        (protocol.CHAIN_HEADER, "G" * 64),
        (protocol.CHAIN_HEADER, "0" * 64 + "\n"),
    ],
)
def test_a_bad_header_is_refused(name: str, value: str | None) -> None:
    """A header that is absent or malformed is refused, and the run's name is checked."""
    headers = {**claim_next(Ledger("uno", 7, owner=1)).headers()}
    headers.pop(name)
    if value is not None:
        headers[name] = value
    with pytest.raises(RefusedError):
        Claim.from_headers(headers)


@pytest.mark.parametrize("name", ["a", "A-b_9", "x" * 64])
def test_good_run_ids(name: str) -> None:
    """Letters, digits, hyphens and underscores name a run."""
    assert check_run_id(name) == name


@given(st.text(max_size=70))
def test_a_run_id_can_only_be_a_folder_name(name: str) -> None:
    """Whatever passes is ASCII and holds no separator, dot or blank."""
    try:
        check_run_id(name)
    except RefusedError:
        return
    assert name.isascii()
    assert name.replace("-", "").replace("_", "").isalnum()


def test_the_next_event_is_applied_and_a_former_one_is_answered_again() -> None:
    """Each event is applied once; later its stored answer comes back."""
    ledger, claims = ledger_with(3)
    assert ledger.last_seq == 3
    assert [ledger.judge(claim) for claim in claims] == [b"answer 1", b"answer 2", b"answer 3"]
    assert ledger.judge(claim_next(ledger)) is None
    assert ledger.last_seq == 3


def test_a_gap_says_what_is_expected() -> None:
    """An event that comes too early is refused with the number expected."""
    ledger, _claims = ledger_with(3)
    with pytest.raises(RefusedError) as caught:
        ledger.judge(replace(claim_next(ledger), seq=5))
    assert (caught.value.code, caught.value.status, caught.value.facts) == ("gap", 409, {"expected": 4})


def test_other_bytes_are_a_conflict() -> None:
    """Other bytes for an applied event, and a next event of another history, are refused with 422."""
    ledger, claims = ledger_with(3)
    assert code_of(ledger, replace(claims[1], digest="0" * 64)) == "conflict"
    assert code_of(ledger, replace(claim_next(ledger), chain="0" * 64)) == "conflict"
    assert code_of(ledger, replace(claim_next(ledger), digest="0" * 64)) == "conflict"


def test_an_older_owner_is_fenced() -> None:
    """A client that attached gets a higher number than any known, and all others are refused."""
    ledger, claims = ledger_with(1)
    assert ledger.attach(0) == 2
    assert code_of(ledger, claims[0]) == "fenced"
    assert code_of(ledger, replace(claims[0], owner=3)) == "fenced"
    assert ledger.attach(9) == 10
    assert ledger.judge(replace(claims[0], owner=10)) == b"answer 1"


def test_old_answers_are_forgotten() -> None:
    """The latest 64 answers are kept; an older event is neither applied nor answered."""
    ledger, claims = ledger_with(protocol.ANSWERS_KEPT + 1)
    assert len(ledger.answers) == protocol.ANSWERS_KEPT
    assert code_of(ledger, claims[0]) == "forgotten"
    assert ledger.judge(claims[1]) == b"answer 2"


def test_a_ledger_travels_as_json() -> None:
    """A ledger read from its own JSON is the same ledger."""
    ledger, _claims = ledger_with(5)
    assert Ledger.from_json(ledger.to_json()) == ledger
    assert Ledger.from_json(ledger.to_json()).chain == ledger.chain
