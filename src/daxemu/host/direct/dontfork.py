"""MADV_DONTFORK in the zone: addresses that the child of a fork does not get.

Counterpart in Linux: VM_DONTCOPY, which dup_mmap() obeys. A replacement of a mapping is another VMA, without
the flag. So ``Space.unforked`` has the addresses, and the flag is set again before each fork.
"""

from __future__ import annotations

from daxemu.host.direct.requests import run
from daxemu.host.direct.syscalls import MADV_DOFORK, MADV_DONTFORK, madvise
from daxemu.host.direct.table import Space
from daxemu.ranges import Range


async def set_forked(space: Space, addresses: Range, *, is_forked: bool) -> None:
    """Let the child of a fork have the areas in ``addresses`` (MADV_DOFORK), or not (MADV_DONTFORK).

    Precondition: ``Space.lock`` is held. Raises OSError, AddressSpaceGone; ``Space.unforked`` then has each
    address with the flag.
    """
    for part in space.parts(addresses):
        start, end = part.addresses
        if is_forked:
            await run(space, [madvise(start, end - start, MADV_DOFORK)])
            space.unforked.remove(start, end)
        else:
            space.unforked.add(start, end)
            await run(space, [madvise(start, end - start, MADV_DONTFORK)])


async def before_fork(space: Space) -> None:
    """Set MADV_DONTFORK again where replacements lost the flag. Raises OSError, AddressSpaceGone.

    Precondition: ``Space.lock`` is held until the fork is complete.
    """
    calls = [madvise(part.start, part.length, MADV_DONTFORK) for part in space.unforked]
    if calls:
        await run(space, calls)
