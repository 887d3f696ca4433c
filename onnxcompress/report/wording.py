"""Figures in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def speed_text(latency: Mapping[str, Any]) -> str:
    """The speed-up with its 95 % interval, in words that say no more than was measured."""
    ratio, low, high = latency["ratio"], latency["low"], latency["high"]
    interval = f"({low:.2f}-{high:.2f})"
    if low <= 1 <= high:
        return f"no difference measured {interval}"
    return f"x{ratio:.2f} as fast {interval}"


def change(before: float, after: float) -> str:
    """The change in per cent; empty where nothing changed or nothing was there."""
    if not before or before == after:
        return ""
    return f"{100 * (after / before - 1):+.1f} %"


def bytes_text(size: float) -> str:
    """Bytes with a decimal unit, as file managers show them."""
    for unit in ("B", "kB", "MB"):
        if abs(size) < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
