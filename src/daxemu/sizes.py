"""Sizes in bytes, as text."""

from __future__ import annotations

import re

from daxemu.errors import InvalidArgument

_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
_SIZE = re.compile(r"([+-]?)(0x[0-9a-f]+|\d+(?:\.\d+)?)([BKMGTP]?)(?:i?B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return a size in bytes from text. Raises InvalidArgument.

    The text is decimal, with K, M, G, T for powers of 1024, or hexadecimal.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidArgument(
            f"{text!r} is not a size: give bytes, or a number with K, M, G or T, such as 4K"
        )
    sign, number, unit = match.groups()
    if len(number) > 20:
        raise InvalidArgument(f"{number[:20]}... is more bytes than any device has")
    size = float(number) if "." in number else int(number, 0) if "x" in number.lower() else int(number)
    result = size * _UNITS[unit.upper()]
    if result != int(result):
        raise InvalidArgument(f"{text!r} is not a whole number of bytes")
    return -int(result) if sign == "-" else int(result)


def human(size: int) -> str:
    """Return a short text for a size in bytes: 6T, 1.5G, 4K, 512."""
    for unit in ("P", "T", "G", "M", "K"):
        scale = _UNITS[unit]
        if size >= scale:
            return f"{size / scale:.1f}".removesuffix(".0") + unit
    return str(size)


def counted(number: int, what: str) -> str:
    """Return a number with its noun: 1 trial, 2 trials."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
