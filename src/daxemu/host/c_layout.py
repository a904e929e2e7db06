"""Structs that C and Python share: comparison of sizes and offsets in Python with those in a library."""

from __future__ import annotations

import ctypes
import re
import struct

REBUILD = "rebuild it with: python setup.py build_ext --inplace"
_NUMBER = ctypes.c_uint32


def layout_of(*structs: struct.Struct | type[ctypes.Structure]) -> list[int]:
    """Return the size of each struct and the offset of each field except padding, in bytes."""
    numbers: list[int] = []
    for each in structs:
        if isinstance(each, struct.Struct):
            numbers += [each.size, *_offsets(each.format)]
        else:
            fields = (getattr(each, field[0]) for field in each._fields_)
            numbers += [ctypes.sizeof(each), *(field.offset for field in fields)]
    return numbers


def _offsets(text: str) -> list[int]:
    order, fields = text[0], re.findall(r"(\d*)([a-zA-Z?])", text[1:])
    offsets, before = [], order
    for count, kind in fields:
        for part in [count + kind] if kind in "sx" else [kind] * int(count or 1):
            if kind != "x":
                offsets.append(struct.calcsize(f"{before}0{kind}"))
            before += part
    return offsets


def refusal(
    library: ctypes.CDLL, symbol: str, *structs: struct.Struct | type[ctypes.Structure]
) -> str | None:
    """Return an error text for a library with other sizes or offsets than ``structs``; None for equal ones.

    ``symbol`` names an array of uint32_t in the library: a count, then as many numbers, in the order of
    :func:`layout_of`. Raises ValueError if the library lacks the symbol.
    """
    expected = layout_of(*structs)
    count = _NUMBER.in_dll(library, symbol).value
    found = list((_NUMBER * (1 + count)).in_dll(library, symbol))[1:]
    if found == expected:
        return None
    return (
        f"{symbol} says {len(found)} sizes and offsets of structs, which differ from the {len(expected)} in"
        f" Python: {REBUILD}"
    )
