"""What others sent, made fit for a screen."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text without what would steer a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
