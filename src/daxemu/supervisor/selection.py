"""Which events a follower asked for."""

from __future__ import annotations

from daxemu.events import Event, decode
from daxemu.protocol import FileRange, Follow


def selects(wanted: Follow, line: bytes) -> bool:
    """Whether an encoded event is one that ``wanted`` asks for. Who wants all costs nothing."""
    narrowed = (wanted.files, wanted.ranges, wanted.pids) != (None, None, None)
    if wanted.events is None and not narrowed:
        return True
    event = decode(line)
    if wanted.events is not None and type(event).__name__ not in wanted.events:
        return False
    return not narrowed or _concerns(event, wanted)


def _concerns(event: Event, wanted: Follow) -> bool:
    """By what the event says it is of: a file, a process, device bytes or pfns, or else everybody."""
    ino: int | None = getattr(event, "ino", None)
    pid: int | None = getattr(event, "pid", None)
    offset: int | None = getattr(event, "offset", None)
    length: int = getattr(event, "length", 0)
    if ino is not None:
        return any(file.ino == ino and _overlaps(file, offset, length) for file in wanted.files or ())
    if pid is not None:
        return pid in (wanted.pids or ())
    if offset is not None:
        return any(start < offset + length and offset < start + size for start, size in wanted.ranges or ())
    return not hasattr(event, "pfn")


def _overlaps(file: FileRange, offset: int | None, length: int) -> bool:
    if offset is None:
        return True
    return file.offset < offset + length and (file.length is None or offset < file.offset + file.length)
