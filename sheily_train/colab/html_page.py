"""The web page that a tunnel, a portal or another program shows in a worker's place."""

from __future__ import annotations

import re
from collections.abc import Mapping

from sheily_train.colab.screen import printable
from sheily_train.i18n import _

_TITLE = re.compile(rb"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)


def page_title(headers: Mapping[str, str], body: bytes) -> str | None:
    """The title of a reply that is an HTML page; ``None`` when it is none."""
    if "html" not in headers.get("Content-Type", "") and body.lstrip()[:1] != b"<":
        return None
    found = _TITLE.search(body[:20000])
    title = " ".join(printable(found[1].decode(errors="replace")).split())[:80] if found else ""
    return title or _("sin título")
