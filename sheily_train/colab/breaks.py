"""Where a run went back and went on with the numbers of another machine: what its chain holds of it.

Up to a *break* after event S both machines have the same state; the events after S are trained anew. The break is mixed
into the chain value after S as an event is, so that two ends that agree on a chain value agree on the breaks too, and a
worker of the history that was left is never taken for one of this.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from sheily_train.colab.protocol import next_chain, rebase_digest
from sheily_train.colab.screen import printable
from sheily_train.i18n import _


@dataclass(frozen=True)
class Break:
    """One break: the last event that both machines have in common, their fingerprints, and when it was made."""

    seq: int
    left: dict[str, str]
    taken: dict[str, str]
    time: str

    def digest(self) -> str:
        """What is mixed into the chain."""
        machines = (json.dumps(machine, sort_keys=True) for machine in (self.left, self.taken))
        return rebase_digest(self.seq, self.time, *machines)

    def to_json(self) -> dict[str, Any]:
        """The break as JSON values."""
        return {"seq": self.seq, "from": self.left, "to": self.taken, "time": self.time}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The break that :meth:`to_json` gave."""
        return cls(value["seq"], value["from"], value["to"], value["time"])


class Breaks:
    """The breaks of a run, in the order in which they were made.

    One that goes back further takes the place of those after it: their events are trained anew without a stop.
    """

    def __init__(self, made: Iterable[Break] = ()) -> None:
        self.made = tuple(made)
        in_force: list[Break] = []
        for each in self.made:
            in_force = [*(other for other in in_force if other.seq <= each.seq), each]
        self._digests: dict[int, list[str]] = {}
        for each in in_force:
            self._digests.setdefault(each.seq, []).append(each.digest())
        self.last_seq = in_force[-1].seq if in_force else 0
        """The event after which no break follows: a worker before it must be given a state, it cannot replay."""

    def mix(self, seq: int, chain: str) -> list[str]:
        """The chain values after event ``seq``: before its breaks, and after each; the last one is the event's."""
        chains = [chain]
        for digest in self._digests.get(seq, ()):
            chains.append(next_chain(chains[-1], digest))
        return chains

    def walk(self, first: str, digests: Sequence[str]) -> Iterator[str]:
        """The chain values after event 0, 1, 2, …, given the first one and the events' digests."""
        chain = self.mix(0, first)[-1]
        yield chain
        for seq, digest in enumerate(digests, 1):
            chain = self.mix(seq, next_chain(chain, digest))[-1]
            yield chain

    def earlier(self) -> list[Breaks]:
        """The breaks as they were before each was made: the histories that were left."""
        return [Breaks(self.made[:count]) for count in range(len(self.made))]


def whereto(seq: int) -> str:
    """Where a run goes back to, for a person."""
    return _("al evento {seq}").format(seq=seq) if seq else _("al principio")


def differences(left: dict[str, str], taken: dict[str, str]) -> str:
    """What two fingerprints do not have in common, for a person."""
    names = sorted(name for name in left.keys() | taken.keys() if left.get(name) != taken.get(name))
    return printable(", ".join(f"{name} {left.get(name)} → {taken.get(name)}" for name in names))
