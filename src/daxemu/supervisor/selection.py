"""Selection of the events that a follower requested."""

from __future__ import annotations

from daxemu.events import Event, decode
from daxemu.fields import Kind, declared, values
from daxemu.protocol import FileRange, Follow
from daxemu.uapi import U64_MAX

_ABOUT = {Kind.INODE, Kind.PID, Kind.DEVICE_OFFSET, Kind.PFN}
"""Kinds of fields that name the subject of an event."""


def selects(wanted: Follow, line: bytes) -> bool:
    """Return True if ``wanted`` requests the encoded event ``line``. A request for all decodes nothing."""
    narrowed = (wanted.files, wanted.ranges, wanted.pids) != (None, None, None)
    if wanted.events is None and not narrowed:
        return True
    event = decode(line)
    if wanted.events is not None and type(event).__name__ not in wanted.events:
        return False
    return not narrowed or _concerns(event, wanted)


def _concerns(event: Event, wanted: Follow) -> bool:
    """Return True if the fields of the event name a file, a process or device bytes of ``wanted``.

    An event that names only pfns concerns no follower with such a condition. An event without a subject
    (_ABOUT) concerns every follower.
    """
    if _ABOUT.isdisjoint(field.kind for field in declared(type(event)).values()):
        return True
    pids = values(event, Kind.PID)
    return (
        any(_is_in(file, event) for file in wanted.files or ())
        or any(pid in pids for pid in wanted.pids or ())
        or any(_overlaps(event, Kind.DEVICE_OFFSET, start, size) for start, size in wanted.ranges or ())
    )


def _is_in(file: FileRange, event: Event) -> bool:
    if file.ino not in values(event, Kind.INODE):
        return False
    whole = not values(event, Kind.FILE_OFFSET)
    return whole or _overlaps(event, Kind.FILE_OFFSET, file.offset, file.length)


def _overlaps(event: Event, kind: Kind, start: int, length: int | None) -> bool:
    """Return True if the event's bytes (offset: the field of ``kind``) overlap a range of bytes.

    ``length`` None: a range without an end.
    """
    (size,) = values(event, Kind.LENGTH) or [1]
    end = U64_MAX if length is None else start + length
    return any(start < offset + size and offset < end for offset in values(event, kind))
