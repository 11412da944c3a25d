"""Translation of what a person reads on the screen: the Spanish text is its own key.

A catalog for another language is a compiled gettext file ``locale/<language>/LC_MESSAGES/sheily.mo`` beside this
module; it is chosen by gettext's usual environment (``LANGUAGE``, ``LC_ALL``, ``LC_MESSAGES``, ``LANG``).
"""

from __future__ import annotations

import gettext
from pathlib import Path

_catalog = gettext.translation("sheily", Path(__file__).parent / "locale", fallback=True)
_ = _catalog.gettext
ngettext = _catalog.ngettext
"""The first text for one, the second for any other number: ``ngettext("{n} lote", "{n} lotes", n).format(n=n)``."""
