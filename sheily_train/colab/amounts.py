"""Amounts as a person reads them; a dash where there is none."""

from __future__ import annotations

from sheily_train.i18n import ngettext


def number_text(value: float | None) -> str:
    """A loss or so: four decimals, or four digits when it is tiny."""
    return "—" if value is None else f"{value:.4g}" if abs(value) < 1e-3 else f"{value:.4f}"


def count_text(value: float | None) -> str:
    """A whole number, its thousands apart."""
    return "—" if value is None else f"{value:,.0f}".replace(",", "\u202f")


def vectors_text(count: int) -> str:
    """So many vectors, as a terminal's line tells them."""
    return ngettext("{count} vector", "{count} vectores", count).format(count=count)


def batches_text(count: int) -> str:
    """So many batches, as a terminal's line tells them."""
    return ngettext("{count} lote", "{count} lotes", count).format(count=count)


def percent_text(share: float | None, sign: str = "") -> str:
    """A share of 0..1 as a percentage; ``sign="+"`` shows the sign of a rise too."""
    return "—" if share is None else f"{share:{sign}.1%}".replace("%", "\u202f%").replace("-", "−")


def time_text(seconds: float | None) -> str:
    """Seconds, or milliseconds below one."""
    if seconds is None:
        return "—"
    return f"{seconds:.1f}\u202fs" if seconds >= 1 else f"{seconds * 1000:.0f}\u202fms"


def size_text(amount: int) -> str:
    """Bytes, in the unit that suits them."""
    unit, divisor = next((unit for unit in (("GB", 1e9), ("MB", 1e6)) if amount >= unit[1]), ("kB", 1e3))
    return f"{amount / divisor:.1f}\u202f{unit}"
