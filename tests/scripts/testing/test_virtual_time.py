from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from random import Random
from typing import Any

import pytest

from sheily_train.scripts.testing.virtual_time import NothingLeft, VirtualLoop


def run(work: Coroutine[Any, Any, Any], seed: int = 0) -> Any:
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(Random(seed))) as runner:
        return runner.run(work)


def test_waiting_costs_no_real_time_and_keeps_its_order() -> None:
    """A day of sleeping passes at once, and who sleeps less wakes first."""
    woken: list[int] = []

    async def sleep(hours: int) -> None:
        await asyncio.sleep(3600 * hours)
        woken.append(hours)

    async def work() -> float:
        await asyncio.gather(sleep(24), sleep(1), sleep(5))
        return asyncio.get_running_loop().time()

    begun = time.monotonic()
    assert run(work()) == 24 * 3600
    assert woken == [1, 5, 24]
    assert time.monotonic() - begun < 5


def test_timeouts_follow_the_virtual_clock() -> None:
    """A timeout cuts what takes longer in virtual seconds, and nothing that takes less."""

    async def work() -> None:
        async with asyncio.timeout(10):
            await asyncio.sleep(9)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(10):
                await asyncio.sleep(11)

    run(work())


def test_threads_are_turns_of_the_loop() -> None:
    """What would run in a thread runs in one piece, though its caller was cancelled, and its error comes out."""
    done: list[str] = []

    async def work() -> None:
        task = asyncio.create_task(asyncio.to_thread(done.append, "written"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(1)
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 // 0)

    run(work())
    assert done == ["written"]


def test_a_wait_for_what_cannot_happen_is_told() -> None:
    """When nothing is left that could wake anybody, the loop says so and does not hang."""

    async def work() -> None:
        await asyncio.Event().wait()

    with pytest.raises(NothingLeft):
        run(work())
