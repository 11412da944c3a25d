"""Web pages in a worker's place."""

from __future__ import annotations

import pytest

from sheily_train.colab.html_page import page_title


@pytest.mark.parametrize(
    ("headers", "body", "title"),
    [
        ({"Content-Type": "text/html; charset=utf-8"}, b"<TITLE>\n ngrok  error\n</TITLE>", "ngrok error"),
        ({}, b"  <!doctype html><title lang=en>Hi</title>", "Hi"),
        ({"Content-Type": "text/html"}, b"", "sin título"),
        ({}, b"<title>\x1b]0;red\x07 alert</title>", "]0;red alert"),
        ({}, b"<html>" + b" " * 30_000 + b"<title>far away</title>", "sin título"),
        ({}, b"<title>" + b"x" * 200 + b"</title>", "x" * 80),
        ({"Content-Type": "application/json"}, b'{"error": "<title>no page</title>"}', None),
        ({}, b"", None),
    ],
)
def test_a_page_is_known_by_its_title(headers: dict[str, str], body: bytes, title: str | None) -> None:
    """By what it says it is or by how it begins; its title in one line, and short; no JSON is taken for one."""
    assert page_title(headers, body) == title
