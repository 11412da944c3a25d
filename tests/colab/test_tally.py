from __future__ import annotations

from typing import Any

from sheily_train.colab.tally import Tally


def step(seq: int, loss: float) -> dict[str, Any]:
    return {"event": "step", "seq": seq, "samples": 4, "loss": loss, "anomaly_prob": loss / 10, "anomalies": seq}


def tally_of(*records: dict[str, Any]) -> Tally:
    tally = Tally()
    for record in records:
        tally.add(record)
    return tally


def test_it_takes_what_a_plain_worker_leaves_out() -> None:
    """No anomalies, no numbers: it still counts."""
    tally = tally_of({"event": "step", "seq": 1, "samples": 4, "loss": None, "anomaly_prob": None})
    assert tally.numbers() == {
        **{"batches": 1, "vectors": 4, "loss_first": None, "loss": None, "anomalies": 0},
        **{"feedback": 0, "validated": 0, "retries": 0, "anomaly_prob": 0.0},
    }


def test_the_summary_takes_a_loss_that_nobody_knows() -> None:
    """A plain worker's null is no number: it is left out of the first one, the last one and the mean."""
    unknown = {"event": "step", "samples": 4, "loss": None, "anomaly_prob": None}
    assert "Loss" not in tally_of({**unknown, "seq": 1}).text()
    some = tally_of({**unknown, "seq": 1}, step(2, 2.0), step(3, 1.0), {**unknown, "seq": 4})
    assert "   Loss: 1.000000 (primera 2.000000, media 1.500000)" in some.text().splitlines()[1]


def test_one_is_told_as_one() -> None:
    """A summary of a single vector reads right."""
    text = tally_of({**step(1, 2.0), "samples": 1}).text()
    assert "1 vector marcado" in text
    assert text.endswith("   Lotes: 1 (1 vector)")


def test_an_event_told_twice_counts_once() -> None:
    """What is told again as it was changes nothing."""
    once, twice = tally_of(step(1, 2.0)), tally_of(step(1, 2.0), step(1, 2.0))
    assert once == twice


def test_what_was_trained_anew_counts_in_place_of_what_was() -> None:
    """After a run went back, its later events count once, as they were told last; retries are not forgotten."""
    good = {"event": "feedback", "seq": 3, "validated": True}
    bad = {**good, "validated": False}
    retry = {"event": "retry", "reason": "cut"}
    back = {"event": "rebase", "seq": 1, "from": {}, "to": {}}
    gone_back = tally_of(step(1, 2.0), step(2, 9.0), good, retry, back, step(2, 3.0), bad)
    assert gone_back == tally_of(retry, step(1, 2.0), step(2, 3.0), bad)
    assert (gone_back.loss, gone_back.validated, gone_back.batches) == (3.0, 0, 2)


def test_an_event_told_otherwise_replaces_all_from_there_on() -> None:
    """Without a word about it in between, the later record counts."""
    assert tally_of(step(1, 2.0), step(2, 9.0), step(3, 8.0), step(2, 3.0)) == tally_of(step(1, 2.0), step(2, 3.0))
