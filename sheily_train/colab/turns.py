"""The order in which a run's events are applied, though their requests come over several connections."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from sheily_train.colab.protocol import Claim

REORDER_WINDOW = 16


class RunTurns:
    """The order in which one run's events reach the learner thread: one that came early waits for those before it."""

    def __init__(self, last: int, owner: int) -> None:
        self._moved = asyncio.Event()
        self.restart(last, owner)

    def restart(self, last: int, owner: int) -> None:
        """A client attached, or the state was replaced: ``last`` is the last event applied."""
        self._last, self._owner = last, owner
        self._wake()

    async def wait(self, claim: Claim, seconds: float) -> None:
        """Return when it is the event's turn, or waiting is no use: the ledger then says why it is refused."""
        if claim.seq > self._last + REORDER_WINDOW:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while claim.owner == self._owner and claim.seq > self._last + 1:
                    await self._moved.wait()

    def passed(self, claim: Claim) -> None:
        """The event is queued, or applied: the next one may follow."""
        if claim.owner == self._owner and claim.seq > self._last:
            self._last = claim.seq
            self._wake()

    def fall_back(self, claim: Claim, last: int) -> None:
        """The event was refused; ``last`` is the last one applied by then. Those queued since move on by themselves."""
        if claim.owner == self._owner:
            self._last = last

    def _wake(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()
