"""Notices: events as addresses of the calling process."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from daxemu.host.proc.mountinfo import Mount

if TYPE_CHECKING:
    from daxemu.events import Event, FileDamaged, StoreLost


class Notice(NamedTuple):
    """Lost bytes of a file. ``path`` None: all bytes of all files, after a shutdown or a removal.

    ``addresses``: present mappings of the lost bytes in the calling process, as (address, length) in bytes,
    touched or not.
    """

    event: Event
    path: str | None
    offset: int
    length: int
    addresses: tuple[tuple[int, int], ...]


def notice_of(event: Event, mount: Mount, *, only_mapped: bool) -> Notice | None:
    """Make the notice of an event for the calling process. None if the event does not concern the process,
    or, with ``only_mapped``, if the process has none of the lost bytes mapped.
    """
    from daxemu.events import DeviceRemoved, FileDamaged, FilesystemShutdown, StoreLost

    if isinstance(event, FilesystemShutdown | DeviceRemoved):
        return Notice(event, None, 0, 0, ())
    if not isinstance(event, FileDamaged | StoreLost):
        return None
    addresses = tuple(_own_addresses(event, mount))
    if only_mapped and not addresses:
        return None
    return Notice(event, event.path, event.offset, event.length, addresses)


def _own_addresses(event: FileDamaged | StoreLost, mount: Mount) -> list[tuple[int, int]]:
    from daxemu.host.proc import maps
    from daxemu.ranges import Range
    from daxemu.units import PFN_PHYS

    found = []
    for vma in maps.read(os.getpid(), mount.dev):
        first = PFN_PHYS(vma.pgoff)
        lost = Range(event.offset, event.offset + event.length).clip(first, first + vma.end - vma.start)
        if vma.ino == event.ino and lost:
            found.append((vma.start + lost.start - first, lost.length))
    return found
