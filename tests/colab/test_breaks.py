from __future__ import annotations

from itertools import pairwise

from sheily_train.colab.breaks import Break, Breaks, differences
from sheily_train.colab.protocol import next_chain

CPU, GPU = {"device": "cpu", "torch": "2.13"}, {"device": "cuda", "torch": "2.13"}
TIME = "2026-01-31T12:00:00.000000+00:00"
FIRST, DIGESTS = "f" * 64, [f"{number:064x}" for number in range(1, 6)]


def walked(*made: Break) -> list[str]:
    return list(Breaks(made).walk(FIRST, DIGESTS))


def test_without_a_break_the_chain_is_the_protocols() -> None:
    """Nothing is mixed in where nothing happened."""
    chains = walked()
    assert chains[0] == FIRST
    assert all(after == next_chain(before, digest) for (before, after), digest in zip(pairwise(chains), DIGESTS))  # noqa: B905


def test_a_break_changes_the_chain_from_its_event_on() -> None:
    """Everything about it counts: event, machines, time."""
    made = Break(2, CPU, GPU, TIME)
    others = [Break(3, CPU, GPU, TIME), Break(2, GPU, CPU, TIME), Break(2, CPU, GPU, TIME.replace("12", "13"))]
    assert [a == b for a, b in zip(walked(made), walked(), strict=True)] == [True, True, False, False, False, False]
    ends = [chains[-1] for chains in (walked(), walked(made), *map(walked, others), walked(made, made))]
    assert len(set(ends)) == len(ends)


def test_a_break_further_back_takes_the_place_of_those_after_it() -> None:
    """Their events are trained anew without a stop; those at the same event or before stay."""
    early, late, back = Break(1, CPU, GPU, TIME), Break(4, GPU, CPU, TIME), Break(1, CPU, GPU, TIME.replace("12", "13"))
    assert Breaks([early, late]).last_seq == 4
    assert Breaks([early, late, back]).last_seq == 1
    assert walked(early, late, back) == walked(early, back)
    assert Breaks().last_seq == 0


def test_earlier_histories_are_those_before_each_break() -> None:
    """As many as there are breaks, from none of them on."""
    made = [Break(1, CPU, GPU, TIME), Break(4, GPU, CPU, TIME)]
    assert [past.made for past in Breaks(made).earlier()] == [(), (made[0],)]


def test_a_break_travels_as_json() -> None:
    """And is the same afterwards."""
    made = Break(2, CPU, GPU, TIME)
    assert Break.from_json(made.to_json()) == made


def test_differences_are_named() -> None:
    """What is equal is not told; a worker's words cannot steer the terminal."""
    assert differences(CPU, {"device": "\x1b[2Jgpu"}).startswith("device cpu →  [2Jgpu")
    assert differences(CPU, GPU | {"threads": "2"}) == "device cpu → cuda, threads None → 2"
