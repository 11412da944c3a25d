"""Translation of what a person reads on the screen: the Spanish text is its own key.

``_n("{count} paso", "{count} pasos", count)`` chooses by a whole number; what it gives is formatted as ``_()``'s.

A catalog for another language is a compiled gettext file ``locale/<language>/LC_MESSAGES/sheily.mo`` beside this
module; it is chosen by gettext's usual environment (``LANGUAGE``, ``LC_ALL``, ``LC_MESSAGES``, ``LANG``).
"""

from __future__ import annotations

import gettext
from pathlib import Path

_translation = gettext.translation("sheily", Path(__file__).parent / "locale", fallback=True)
_, _n = _translation.gettext, _translation.ngettext
