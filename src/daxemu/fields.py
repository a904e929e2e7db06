"""Types of fields in events, requests and replies: each declares what the number counts, and its unit.

A type checker sees the plain type (``int``). ``declared()`` returns the declaration at run time: the page
docs/protocol.md prints the unit, and a follower's selection finds the fields of a kind whatever their names.
"""

from __future__ import annotations

from enum import StrEnum
from functools import cache
from typing import Annotated, Any, NamedTuple, get_args, get_origin

import msgspec


class Kind(StrEnum):
    """Kind of a quantity or a name in a field. The value is the word in docs/protocol.md."""

    FILE_OFFSET = "file offset"
    DEVICE_OFFSET = "device offset"
    ADDRESS = "virtual address"
    LENGTH = "length"
    PFN = "page frame number"
    PAGES = "number of pages"
    INODE = "inode number"
    PID = "process"
    TID = "thread"
    COUNT = "count"
    DURATION = "duration"
    TIME = "time since the epoch"


class Field(NamedTuple):
    """Declaration of a field: kind, and unit in words ("" where the kind has none)."""

    kind: Kind
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.kind}, {self.unit}" if self.unit else str(self.kind)


FileOffset = Annotated[int, Field(Kind.FILE_OFFSET, "bytes")]
DeviceOffset = Annotated[int, Field(Kind.DEVICE_OFFSET, "bytes")]
Address = Annotated[int, Field(Kind.ADDRESS, "bytes")]
Length = Annotated[int, Field(Kind.LENGTH, "bytes")]
Pfn = Annotated[int, Field(Kind.PFN, "4096-byte pages")]
Pages = Annotated[int, Field(Kind.PAGES, "4096 bytes each")]
Ino = Annotated[int, Field(Kind.INODE)]
Pid = Annotated[int, Field(Kind.PID)]
Tid = Annotated[int, Field(Kind.TID)]
Signals = Annotated[int, Field(Kind.COUNT, "signals")]
Processes = Annotated[int, Field(Kind.COUNT, "processes")]
Files = Annotated[int, Field(Kind.COUNT, "files")]
Seconds = Annotated[float, Field(Kind.DURATION, "seconds")]
# A time that no clock shows (from a damaged file) is refused when decoded.
Time = Annotated[float, Field(Kind.TIME, "seconds"), msgspec.Meta(ge=0, lt=1 << 40)]


@cache
def declared(struct: type[msgspec.Struct]) -> dict[str, Field]:
    """Return the declarations of a struct's fields, by name. A list has that of its items."""
    found = {field.name: _declaration(field.type) for field in msgspec.structs.fields(struct)}
    return {name: field for name, field in found.items() if field is not None}


def values(of: msgspec.Struct, kind: Kind) -> list[Any]:
    """Return the values of the fields of ``kind``, in order. A tuple or list adds its items, null nothing."""
    found: list[Any] = []
    for name, field in declared(type(of)).items():
        if field.kind is kind:
            value = getattr(of, name)
            found += value if isinstance(value, list | tuple) else () if value is None else (value,)
    return found


def _declaration(kind: object) -> Field | None:
    for note in getattr(kind, "__metadata__", ()):
        if isinstance(note, Field):
            return note
    arguments = get_args(kind)
    record = get_origin(kind) is tuple and arguments[-1] is not Ellipsis
    return _declaration(arguments[0]) if arguments and not record else None
