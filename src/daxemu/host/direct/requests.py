"""Requests to the kernel for one address space: by its agent, or to one of its userfaultfds.

Purpose: errors of batches, and repetition while the address space changes. The caller holds ``Space.lock``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from daxemu.host.direct.errors import AddressSpaceChanging, AddressSpaceGone
from daxemu.host.direct.populate import without_population
from daxemu.host.direct.syscalls import Syscall
from daxemu.host.direct.table import Space
from daxemu.ranges import Range

LARGE = 32 << 20
"""Bytes from which a write-protection runs in a worker thread: 24 ms for 1 GiB."""
_CHANGING = 0.0002
"""Seconds between two attempts while the kernel answers EAGAIN: a fork or mremap is not finished."""


async def run(space: Space, batch: Sequence[Syscall]) -> None:
    """Have the agent make the calls. Raises OSError with the first error, after all calls are made, and
    AddressSpaceGone.
    """
    if space.is_gone:
        raise AddressSpaceGone(f"process {space.tgid} has ended")
    batch = without_population(batch) if space.locks_future else batch
    for call, result in zip(batch, await space.agent.run(batch), strict=True):
        if -4096 < result < 0:
            raise OSError(-result, f"system call {call.number} in process {space.tgid}")


async def write_protect(space: Space, part: Range, *, on: bool, wake: bool = True) -> None:
    """Make stores to ``part`` events, or no longer. ``wake``: let the threads go on that wait there.

    Raises the exceptions of Userfaultfd.write_protect.
    """

    def call() -> None:
        space.uffd_at(part.start).write_protect(part.start, part.length, on, wake)

    await ioctl(space, call, in_thread=part.length > LARGE)


async def ioctl(space: Space, call: Callable[[], object], *, in_thread: bool = False) -> None:
    """Make a request to the userfaultfd, again while a fork or mremap of the space is not finished. Raises
    AddressSpaceGone, and the other exceptions of ``call``.

    Every request may be repeated: what was done before stays done.
    """
    while True:
        if space.is_gone:
            raise AddressSpaceGone(f"process {space.tgid} has ended")
        try:
            if in_thread:
                await trio.to_thread.run_sync(call)
            else:
                call()
        except AddressSpaceChanging:
            await trio.sleep(_CHANGING)
        else:
            return
