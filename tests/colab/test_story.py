"""A run log, read: its numbers, and what it tells when it is long, cut, told twice or damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from sheily_train.colab.story import Rebase, Summary, read_story, split
from sheily_train.errors import DataError, RequestError
from tests.colab.made_logs import Event, session, step, wire, write_log


def told(folder: Path, *events: Event) -> Summary:
    """The summary of a log that holds these events."""
    log = folder / "metrics.jsonl"
    log.unlink(missing_ok=True)
    return read_story(write_log(log, *events)).summary


def test_the_numbers_are_those_of_the_log(tmp_path: Path) -> None:
    """Each number of the summary, worked out by hand."""
    assert told(tmp_path, *session()) == Summary(
        run="principal",
        sessions=1,
        finished=True,
        batches=8,
        vectors=492,
        loss_first=2.0,
        loss_last=0.6,
        loss_best=0.4,
        loss_change=pytest.approx((0.5 - 1.9) / 1.9),
        tendency="falling",
        anomalies=64,
        anomaly_share=pytest.approx(64 / 492),
        anomaly_prob=pytest.approx(0.25),
        feedback=2,
        feedback_validated=1,
        feedback_rate=0.5,
        latency_p50=pytest.approx(0.35),
        latency_p95=pytest.approx(0.755),
        latency_max=pytest.approx(0.8),
        vectors_per_second=246.0,
        bytes=8400,
        retries=1,
        retry_reasons={"502": 1},
        resyncs=1,
        rebases=0,
        snapshots=1,
    )


def test_a_rate_counts_only_sessions_that_ended(tmp_path: Path) -> None:
    """The vectors of a session that was cut do not make the next one faster."""
    cut, whole = (
        [("session", {"number": 1}), step(1, 1.0)],
        [("session", {"number": 2}), step(2, 1.0), ("done", {"seconds": 2.0})],
    )
    found = told(tmp_path, *cut, *whole)
    assert (found.sessions, found.vectors, found.vectors_per_second) == (2, 128, 32.0)
    untimed = [("session", {"number": 3}), step(3, 1.0), ("done", {})]
    found = told(tmp_path, *cut, *whole, *untimed)
    assert (found.sessions, found.vectors, found.vectors_per_second) == (3, 192, 32.0)


def test_an_event_told_twice_counts_once(tmp_path: Path) -> None:
    """A batch that is replayed after a cut is written again, with the same number."""
    found = told(tmp_path, step(1, 1.0), wire(1, 0.1), step(1, 1.0), wire(1, 0.3), step(2, 0.5))
    assert (found.batches, found.vectors, found.latency_max) == (2, 128, 0.3)


def test_a_history_begun_anew_replaces_the_old_one(tmp_path: Path) -> None:
    """A run that starts again, or is taken back, leaves nothing of what it had told from there on."""
    old = [each for seq in range(1, 6) for each in (step(seq, 1.0), wire(seq, 1.0))]
    new = [step(3, 0.5), wire(3, 0.2), ("feedback", {"seq": 4, "validated": True})]
    story = read_story(write_log(tmp_path / "l.jsonl", *old, *new))
    found = story.summary
    assert (found.batches, found.loss_last, found.feedback, found.latency_p50) == (3, 0.5, 1, 1.0)
    assert [each.seq for each in story.wires] == [1, 2, 3]


def test_what_another_machine_trained_anew_replaces_what_was(tmp_path: Path) -> None:
    """After a return each event counts once, as it was told last, though its numbers be the same."""
    old = [each for seq in range(1, 6) for each in (step(seq, 1.0), wire(seq, 1.0))]
    back = ("rebase", {"seq": 2, "from": {"device": "cpu"}, "to": {"device": "cuda"}})
    story = read_story(write_log(tmp_path / "l.jsonl", *old, back, step(3, 1.0), wire(3, 0.2)))
    assert [each.seq for each in story.steps] == [each.seq for each in story.wires] == [1, 2, 3]
    assert (story.summary.rebases, story.summary.batches) == (1, 3)
    assert story.rebases == [Rebase(2, {"device": "cpu"}, {"device": "cuda"})]


@pytest.mark.parametrize(
    ("losses", "tendency"), [((1, 1, 2, 2), "rising"), ((1, 3, 3, 1), "flat"), ((0, 1, 1, 1), None)]
)
def test_the_tendency_compares_the_ends(tmp_path: Path, losses: tuple[float, ...], tendency: str | None) -> None:
    """The last quarter against the first; from nothing no share can be told."""
    found = told(tmp_path, *(step(seq, float(loss)) for seq, loss in enumerate(losses, 1)))
    assert found.tendency == tendency


def test_a_log_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """With the command that writes one."""
    with pytest.raises(RequestError, match=r"no\.jsonl: No such file") as caught:
        read_story(tmp_path / "no.jsonl")
    assert "sheily connect" in caught.value.mend


@pytest.mark.parametrize("line", ["{broken", "[1]", '{"no": "event"}', '{"event": "step", "seq": null}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    """The file and the line."""
    log = write_log(tmp_path / "l.jsonl", step(1, 1.0))
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")
    with pytest.raises(DataError, match=r"l\.jsonl:2"):
        read_story(log)


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 20])
def test_parts_hold_every_value_once_and_in_order(parts: int) -> None:
    """Nearly equal lengths, none empty, never more than asked for."""
    values = list(range(7))
    found = split(values, parts)
    assert [value for part in found for value in part] == values
    assert len(found) == min(parts, 7)
    lengths = [len(part) for part in found]
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1
