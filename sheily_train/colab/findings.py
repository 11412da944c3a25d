"""What a check finds: how it is, in a line for a person, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from sheily_train.colab.screen import printable


class State(StrEnum):
    """How a thing was found."""

    OK = "ok"
    WARNING = "aviso"
    BAD = "mal"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what it is, in a word or two.
        found: what was found, as a line for a person.
        mend: what to do about it; empty when there is nothing to do.
    """

    name: str
    state: State
    found: str
    mend: str = ""


Checks = Iterator[Check]


def hidden(checks: Checks, secrets: set[str]) -> Checks:
    """The checks, with what is secret, or would steer a terminal, taken out of their lines."""
    ordered = sorted(filter(None, secrets), key=len, reverse=True)

    def hide(line: str) -> str:
        for secret in ordered:
            line = line.replace(secret, "…")
        return printable(line)

    for check in checks:
        yield replace(check, found=hide(check.found), mend=hide(check.mend))
