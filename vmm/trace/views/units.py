"""Numbers as people read them."""

from __future__ import annotations

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def count_text(value: float) -> str:
    """1,234,567"""
    return f"{value:,.0f}"


def bytes_text(value: float) -> str:
    """4096 -> 4 KiB; three digits that matter."""
    unit = 0
    while value >= 1024 and unit + 1 < len(_BYTE_UNITS):
        value /= 1024
        unit += 1
    return f"{value:.4g} {_BYTE_UNITS[unit]}"


def time_text(ns: float) -> str:
    """Nanoseconds in the unit that fits: 1.2 us, 3.4 ms, 5.6 s."""
    for limit, divisor, unit in ((1e3, 1, "ns"), (1e6, 1e3, "us"), (1e9, 1e6, "ms")):
        if ns < limit:
            return f"{ns / divisor:.3g} {unit}"
    return f"{ns / 1e9:.4g} s"
