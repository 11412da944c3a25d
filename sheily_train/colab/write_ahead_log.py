"""SQLite's write-ahead log, read before SQLite reads it: does a damaged bit hide what was committed after it?

SQLite goes on, without a word, from the commit before the first frame whose checksum fails. That is right for the last
commit, which a power cut may have torn: nobody had been told of it. But a bit that flips further ahead looks the same,
and takes every later commit with it. Under ``synchronous=FULL`` the two can be told apart: a commit that is followed by
another one was whole on the disk.

The format is https://www.sqlite.org/fileformat2.html#the_write_ahead_log; the checksum there is a linear recurrence, so
a page's words are summed at once, each times what the steps after it make of it.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_HEAD, _FRAME = struct.Struct(">8I"), struct.Struct(">6I")
_SUMMED_HEAD, _SUMMED_FRAME = 24, 8
_BITS = 0xFFFFFFFF

_Sums = tuple[int, int]


def hidden_commits(path: Path, page_bytes: int) -> int:
    """How many commits of a log lie at or after its first damaged frame; 1 may be one that a power cut tore.

    Args:
        path: the log; none need be there.
        page_bytes: of the database, for a log whose own head is damaged.
    """
    log = memoryview(path.read_bytes() if path.is_file() else b"")
    if len(log) < _HEAD.size:
        return 0
    magic, _version, page_bytes_now, _number, *salts, first, second = _HEAD.unpack_from(log)
    words = ">u4" if magic & 1 else "<u4"
    sums = _checksum((0, 0), log[:_SUMMED_HEAD], words)
    whole, hidden = sums == (first, second), 0
    page_bytes = page_bytes_now if whole else page_bytes
    for start in range(_HEAD.size, len(log) - _FRAME.size - page_bytes + 1, _FRAME.size + page_bytes):
        _number, commit, *marks, first, second = _FRAME.unpack_from(log, start)
        page = log[start + _FRAME.size :][:page_bytes]
        if whole:
            sums = _checksum(_checksum(sums, log[start : start + _SUMMED_FRAME], words), page, words)
            whole = marks == salts and sums == (first, second)
        of_this_log = marks[0] == salts[0] or marks[1] == salts[1]  # else left over from before SQLite began it anew
        hidden += not whole and commit > 0 and of_this_log
    return hidden


def _checksum(sums: _Sums, content: memoryview, words: str) -> _Sums:
    """SQLite's checksum of pairs of words, going on from ``sums``: s0 += x0 + s1, then s1 += x1 + s0."""
    pairs = np.frombuffer(content, words).astype(np.uint64).reshape(-1, 2)
    weights, (of_first, of_second) = _weights(len(pairs))
    total = (weights * pairs[:, :, None]).sum((0, 1))
    found = [int(total[place]) + sums[0] * of_first[place] + sums[1] * of_second[place] for place in (0, 1)]
    return found[0] & _BITS, found[1] & _BITS


@lru_cache(4)
def _weights(count: int) -> tuple[NDArray[np.uint64], tuple[_Sums, _Sums]]:
    """What each word of ``count`` pairs, and each sum before them, adds to the two sums after them.

    The words' weights are [pair, word of the pair, sum].
    """
    weights = np.zeros((count, 2, 2), np.uint64)
    of_word: tuple[_Sums, _Sums] = (1, 1), (0, 1)
    of_sum: tuple[_Sums, _Sums] = (1, 0), (0, 1)
    for place in reversed(range(count)):
        weights[place] = of_word
        of_word = _stepped(of_word[0]), _stepped(of_word[1])
        of_sum = _stepped(of_sum[0]), _stepped(of_sum[1])
    return weights, of_sum


def _stepped(sums: _Sums) -> _Sums:
    """The sums after a pair of zeros."""
    return (sums[0] + sums[1]) & _BITS, (sums[0] + 2 * sums[1]) & _BITS
