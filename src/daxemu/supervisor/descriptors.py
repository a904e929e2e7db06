"""File descriptors: the limit of the process, the share of the control socket's peers, and hangups of peers.

A failure needs descriptors (/proc of the victims, a new tracer). Therefore peers get at most a part of the
limit; RESERVE descriptors are for failures.
"""

from __future__ import annotations

import math
import os
import resource
import select
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import trio

from daxemu.errors import Busy
from daxemu.host.descriptors import RESERVE, check_limit

MOST_CONNECTIONS = 512
"""Connections that one user may have open at a time."""


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open files to the hard limit. Raises Unsupported for a limit too low."""
    check_limit()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connections_of_a_user() -> int:
    """Return the number of connections of one user. Two users may connect: the mount's owner and root."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = math.inf if soft == resource.RLIM_INFINITY else max(8, (soft - RESERVE) // 2)
    return int(min(MOST_CONNECTIONS, limit))


class Connections:
    """Number of open connections of each user, limited."""

    def __init__(self) -> None:
        self._limit = connections_of_a_user()
        self._open: Counter[int] = Counter()

    @contextmanager
    def counted(self, uid: int) -> Iterator[None]:
        """Count a connection of ``uid`` during the context. Raises Busy at the limit."""
        if self._open[uid] >= self._limit:
            raise Busy(
                f"uid {uid} has {self._limit} connections to this supervisor, the most there may be: "
                "end some of them (daxemu log --follow, daxemu watch)"
            )
        self._open[uid] += 1
        try:
            yield
        finally:
            self._open[uid] -= 1


class Hangups:
    """Detects peers that close their connection while the supervisor only sends.

    A peer that shuts down its sending half only (``socat``) still receives. epoll reports EPOLLHUP, which
    needs no subscription, once both halves are closed.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._scopes: dict[int, trio.CancelScope] = {}

    def close(self) -> None:
        """Close the epoll descriptor."""
        self._epoll.close()

    async def watch(self) -> None:
        """Cancel the context of each peer that hangs up. Runs until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            for fd, _ in self._epoll.poll(0):
                self._epoll.unregister(fd)
                self._scopes.pop(fd).cancel()

    @contextmanager
    def cancelling(self, peer: trio.SocketStream) -> Iterator[None]:
        """Cancel the context when ``peer`` hangs up."""
        fd = peer.socket.fileno()
        with trio.CancelScope() as scope:
            self._epoll.register(fd, 0)
            self._scopes[fd] = scope
            try:
                yield
            finally:
                if self._scopes.pop(fd, None) is not None:
                    self._epoll.unregister(fd)


class EmergencyDescriptor:
    """Spare descriptor, closed when accept(2) finds no free one: a peer can then be accepted and refused."""

    def __init__(self) -> None:
        self._fd = -1
        self.renew()

    def renew(self) -> bool:
        """Open the descriptor unless open. Return True if open; False if no descriptor is free."""
        if self._fd < 0:
            with suppress(OSError):
                self._fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        return self._fd >= 0

    def give_up(self) -> bool:
        """Close the descriptor. Return True if open before."""
        if self._fd < 0:
            return False
        os.close(self._fd)
        self._fd = -1
        return True
