"""Mappings outside the zone, at addresses that the program names: MAP_FIXED, or a hint.

Outside the zone the filter of ``daxemu run`` sees mmap(2) of a file, mremap(2) and msync(2). All other
calls are the kernel's at once, and the supervisor learns of them in another way:

- munmap(2), and an mmap(2) over a mapping: by an event of a second userfaultfd (UFFD_FEATURE_EVENT_UNMAP).
  The call waits until the event is read.
- mprotect(2): not at all. Before a replacement, the protection is read from /proc/PID/maps.
- madvise(MADV_DONTNEED): not at all. The next touch is a page fault as in the zone.

The kernel sends the same event for the agent's own calls: these ranges are *expected*. The userfaultfd of the
zone has no such event, which would be two round trips more for each copy at the store.

An unmapped address may have memory of the program the next moment. Therefore a replacement first takes the
events that have come, and a guard of the agent (``syscalls.guard``) precedes each mremap(2): while the event
of a munmap(2) is not read, and over memory of the program, the guard fails, and the replacement is planned
anew. Between guard and mremap(2) of the agent lie some 100 ns.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import trio

from daxemu.host.direct import syscalls
from daxemu.host.direct.agent import MOST_OUTSIDE
from daxemu.host.direct.errors import AddressSpaceGone, NotRegistered
from daxemu.host.direct.planner import MappingPiece
from daxemu.host.direct.syscalls import PROT_EXEC, PROT_READ, PROT_WRITE, Syscall
from daxemu.host.direct.table import Space, Table
from daxemu.host.proc import maps
from daxemu.host.proc.maps import Vma
from daxemu.host.proc.procfs import GONE
from daxemu.host.run import zone
from daxemu.ranges import Range, merged

_MOST_ATTEMPTS = 1000
_AGAIN = 0.0002
"""Seconds between two attempts of a replacement while the program unmaps."""
_PROTECTIONS = ((b"r", PROT_READ), (b"w", PROT_WRITE), (b"x", PROT_EXEC))


def is_outside(addresses: Range) -> bool:
    """Return True if no address is in the zone."""
    return addresses.end <= zone.START or addresses.start >= zone.END


def parts_of(addresses: Range) -> Iterator[Range]:
    """Yield the parts of ``addresses`` below and above the zone."""
    for part in (addresses.clip(0, zone.START), addresses.clip(zone.END, max(zone.END, addresses.end))):
        if part:
            yield part


def bequeath(space: Space) -> None:
    """Tell the agent which addresses outside the zone are mapped: the agent maps the void there once the
    supervisor has ended.

    Raises OSError (ENOMEM) for more ranges than an agent has room for; then nothing is changed.
    """
    found = (area.addresses for area in space.areas.values())
    ranges = list(merged(part for part in found if is_outside(part)))
    if len(ranges) > MOST_OUTSIDE:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    if space.outside.fd >= 0:
        space.agent.bequeath(ranges)


async def reserve(space: Space, addresses: Range) -> bool:
    """Take addresses for a mapping, without access. Return False if any has memory. Raises OSError."""
    call = syscalls.mmap_anonymous(addresses.start, addresses.length, 0, replace=False)
    (result,) = await space.agent.run([call])
    if result == -errno.EEXIST:
        return False
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return True


@contextmanager
def expecting(space: Space, ranges: Iterable[Range]) -> Iterator[None]:
    """Context in which the agent unmaps or replaces ``ranges``. Precondition: ``Space.lock`` is held.

    The agent's call returns after its event is read, so no event is left at the end.
    """
    space.expected.update(part for part in ranges if not zone.has(part.start))
    try:
        yield
    finally:
        space.expected.clear()


class Interrupted(Exception):
    """The program unmaps addresses of a replacement, or has unmapped them.

    ``foreign``: addresses that are not registered, although no event has come.
    """

    def __init__(self, foreign: Sequence[Range] = ()) -> None:
        super().__init__(foreign)
        self.foreign = foreign


async def guarded(table: Table, space: Space, calls: Sequence[tuple[Range, Syscall]]) -> None:
    """Have the agent make calls that replace mappings outside the zone: the addresses of each, and the call.

    Raises OSError, and Interrupted if a call was not made. Precondition: ``Space.lock`` is held.
    """
    fd = space.agent.guard_fd
    batch = [each for place, call in calls for each in (syscalls.guard(*_extent(place), fd), call)]
    space.expected.update(place for place, _ in calls)
    try:
        results = await space.agent.run(batch)
    finally:
        left = space.expected.copy()
        space.expected.clear()
    is_interrupted = False
    for (place, _), result in zip(calls, results[1::2], strict=True):
        if result == -errno.ECANCELED:
            is_interrupted = True
            if not left[place]:  # the event that came was the program's
                unmapped(table, space, place)
        elif -4096 < result < 0:
            raise OSError(-result, os.strerror(-result))
    if is_interrupted:
        guards = zip(calls, results[::2], strict=True)
        raise Interrupted([place for (place, _), result in guards if result == -errno.ENOENT])


async def replaced(
    table: Table,
    space: Space,
    pieces: Sequence[MappingPiece],
    replace: Callable[[Sequence[MappingPiece]], Awaitable[None]],
) -> None:
    """Replace the pieces that are still mapped, again while the program unmaps. ``replace`` raises
    Interrupted. Raises the other exceptions of ``replace``, and NotRegistered after _MOST_ATTEMPTS.
    """
    for attempt in range(_MOST_ATTEMPTS):
        present = as_now(table, space, pieces)
        try:
            if present:
                await replace(present)
        except Interrupted as interrupted:
            # An event may still be on its way. Addresses without one are the program's since long.
            for addresses in interrupted.foreign if attempt > 1 else ():
                forget(table, space, addresses)
        except NotRegistered:
            if attempt == _MOST_ATTEMPTS - 1:
                raise
        else:
            return
        await trio.sleep(_AGAIN)
    raise NotRegistered(f"process {space.tgid} unmaps its direct mappings without end")


def unmapped(table: Table, space: Space, addresses: Range) -> None:
    """Take the event of an unmap: forget the areas, unless the agent itself unmapped them."""
    if space.expected[addresses]:
        space.expected[addresses] -= 1
        return
    forget(table, space, addresses)


def forget(table: Table, space: Space, addresses: Range) -> None:
    """Remove the areas of addresses outside the zone, which the program has unmapped."""
    for part in parts_of(addresses):
        if space.overlapping(part):
            table.stored(space, part, is_unmapped=True)
            table.remove(space, part)
            bequeath(space)


def as_now(table: Table, space: Space, pieces: Sequence[MappingPiece]) -> list[MappingPiece]:
    """Return the pieces still mapped, with the present protection of each. Raises AddressSpaceGone."""
    if not pieces or zone.has(pieces[0].addresses.start):
        return list(pieces)
    space.drain()
    try:
        for piece in pieces:
            for vma in maps.within(space.pid, piece.addresses):
                prot = _protection(vma)
                for part in space.parts(vma.area.clip(*piece.addresses)):
                    if part.prot != prot:
                        table.protect(space, part.addresses, prot)
    except GONE as error:
        raise AddressSpaceGone(f"process {space.tgid} has ended") from error
    return [
        piece.cut(area.addresses)._replace(area=area)
        for piece in pieces
        for area in space.parts(piece.addresses)
    ]


def _extent(part: Range) -> tuple[int, int]:
    return part.start, part.length


def _protection(vma: Vma) -> int:
    return sum(bit for letter, bit in _PROTECTIONS if letter in vma.mode)
