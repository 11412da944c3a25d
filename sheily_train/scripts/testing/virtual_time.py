"""An asyncio event loop whose clock jumps: an hour of waiting costs nothing, and one seed gives one history.

Nothing of it waits for the outside: there are no sockets, and what would run in a thread runs in the loop itself, a
little later. So the order of everything follows from the program and from ``chance`` alone.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

_THREAD_SECONDS = 0.004


class NothingLeft(Exception):
    """Every task waits for something that can no longer happen."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """The loop. Its time begins at 0 and moves on only when nothing is left to do at the present moment."""

    def __init__(self, chance: Random) -> None:
        self._chance = chance
        self._now = 0.0
        super().__init__(_NoFiles(self._advance))

    def time(self) -> float:
        """The virtual seconds since the loop was made."""
        return self._now

    def run_in_executor(  # type: ignore[override]
        self, _executor: Any, work: Callable[..., Any], *arguments: Any
    ) -> asyncio.Future[Any]:
        """Run ``work`` a few virtual milliseconds later, in one piece."""
        future: asyncio.Future[Any] = self.create_future()
        self.call_later(self._chance.uniform(0, _THREAD_SECONDS), _settle, future, work, arguments)
        return future

    def _advance(self, seconds: float | None) -> None:
        if seconds is None:
            raise NothingLeft
        self._now += seconds


def _settle(future: asyncio.Future[Any], work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Do the work even if nobody waits any more: a thread cannot be cancelled."""
    try:
        value = work(*arguments)
    except BaseException as error:
        if not future.done():
            future.set_exception(error)
    else:
        if not future.done():
            future.set_result(value)


class _NoFiles(selectors.BaseSelector):
    """A selector that never finds a file ready, and tells how long it would have waited."""

    def __init__(self, advance: Callable[[float | None], None]) -> None:
        self._advance = advance
        self._keys: dict[int, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        number = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        self._keys[number] = selectors.SelectorKey(fileobj, number, events, data)
        return self._keys[number]

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj if isinstance(fileobj, int) else fileobj.fileno())

    def select(self, timeout: float | None = None) -> list[Any]:
        self._advance(timeout)
        return []

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys
