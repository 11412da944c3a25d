"""Blocking work beside the event loop that is never left half done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

_Worked = TypeVar("_Worked")


async def in_thread(work: Callable[..., _Worked], *arguments: Any) -> _Worked:
    """What ``work`` returns, from a thread.

    As :func:`asyncio.to_thread`, but a cancellation waits for the thread's end, so that what it writes to the disk
    cannot fall into a later call, nor after the files were closed.
    """
    task = asyncio.create_task(asyncio.to_thread(work, *arguments))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)
        raise
