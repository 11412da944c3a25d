from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator

import pytest

from sheily_train.colab.learner_thread import LearnerThread


class Bulky:
    """Stands for a learner of 150 MB."""


@pytest.fixture
def thread() -> Iterator[LearnerThread]:
    thread = LearnerThread(4)
    gc.disable()
    yield thread
    gc.enable()
    thread.close()


def gone(reference: Callable[[], object]) -> bool:
    """Whether it is freed, or soon is: the thread may still be on its way back to the queue."""
    end = time.monotonic() + 5
    while reference() is not None and time.monotonic() < end:
        time.sleep(0.01)
    return reference() is None


def test_what_failed_work_held_is_freed_with_its_error(thread: LearnerThread) -> None:
    """A state that does not fit leaves nothing in memory, without any collection of garbage."""

    def work(bulky: Bulky) -> None:
        mine = bulky
        raise ValueError(f"another network than {type(mine)}")

    bulky = Bulky()
    reference = weakref.ref(bulky)
    result = thread.submit(lambda held=bulky: work(held))  # type: ignore[misc]
    del bulky
    with pytest.raises(ValueError, match="another network"):
        result.result()
    del result
    assert gone(reference)


def test_what_finished_work_held_is_freed_before_the_next(thread: LearnerThread) -> None:
    """A thread that waits for work holds neither the last one nor its result."""
    bulky = Bulky()
    reference = weakref.ref(bulky)
    assert thread.submit(lambda held=bulky: held).result() is bulky  # type: ignore[misc]
    del bulky
    assert gone(reference)
