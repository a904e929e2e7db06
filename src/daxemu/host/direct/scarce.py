"""Steps of an address space where this process has no free descriptor, or the agent is lost.

Invariant: a process whose mappings cannot follow changes of files does not go on.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from daxemu.host.descriptors import EXHAUSTED
from daxemu.host.direct.userfaultfd import Event, Userfaultfd
from daxemu.host.proc import stat

log = logging.getLogger(__name__)

_RETRY = 0.1
"""Seconds between two reads of a userfaultfd while a fork waits for a free descriptor of this process."""


async def next_events(
    uffd: Userfaultfd, readable: Callable[[int], Awaitable[None]] = trio.lowlevel.wait_readable
) -> list[Event]:
    """Wait for events by ``readable``, and read them. The event of a fork needs a descriptor: the fork waits
    until one is free. Raises trio.ClosedResourceError after ``close``.
    """
    while True:
        await readable(uffd.fd)
        if uffd.fd < 0:  # closed after the descriptor was readable
            raise trio.ClosedResourceError
        try:
            return uffd.read()
        except OSError as error:
            if error.errno not in EXHAUSTED:
                raise
        await trio.sleep(_RETRY)
        if uffd.fd < 0:
            raise trio.ClosedResourceError


def kill_child(tgid: int, parent: int) -> None:
    """Kill the child of a fork whose agent has ended. A process with another parent is not killed."""
    with suppress(OSError):
        if stat.read(tgid).parent == parent:
            kill_unfollowed(tgid)


def kill_unfollowed(tgid: int) -> None:
    """Kill a process, unless gone, whose mappings cannot follow changes of files."""
    with suppress(ProcessLookupError):
        os.kill(tgid, signal.SIGKILL)
        log.warning("process %s is killed: its mappings cannot follow changes of files", tgid)
