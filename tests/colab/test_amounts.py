"""Amounts as they are shown."""

from __future__ import annotations

import pytest

from sheily_train.colab.amounts import (
    batches_text,
    count_text,
    number_text,
    percent_text,
    size_text,
    time_text,
    vectors_text,
)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number_text(0.6), "0.6000"),
        (number_text(0.00012345), "0.0001234"),
        (count_text(1234567), "1\u202f234\u202f567"),
        (vectors_text(1), "1 vector"),
        (vectors_text(1000), "1000 vectores"),
        (batches_text(1), "1 lote"),
        (batches_text(0), "0 lotes"),
        (percent_text(-0.125, "+"), "−12.5\u202f%"),
        (percent_text(0.125, "+"), "+12.5\u202f%"),
        (time_text(0.35), "350\u202fms"),
        (time_text(12), "12.0\u202fs"),
        (size_text(900), "0.9\u202fkB"),
        (size_text(2_500_000), "2.5\u202fMB"),
        (size_text(3 * 10**9), "3.0\u202fGB"),
        *((show(None), "—") for show in (number_text, count_text, percent_text, time_text)),
    ],
)
def test_an_amount_has_its_unit(shown: str, expected: str) -> None:
    """Thousands apart, a true minus, the unit that suits; a dash where nothing is known."""
    assert shown == expected
