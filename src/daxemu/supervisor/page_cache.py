"""Page cache of the mount in the kernel: write back, revoke, refresh attributes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import trio

from daxemu.fs.filesystem import Filesystem
from daxemu.host.fuse.gates import Gates
from daxemu.host.fuse.invalidate_lock import InvalidateLock
from daxemu.host.fuse.session import Session
from daxemu.ranges import Range
from daxemu.supervisor import incidents
from daxemu.supervisor.failures import Failures
from daxemu.uapi import Ino


class PageCache:
    """Pages and attributes of files in the kernel. Belongs to the trio thread; calls into the kernel run in
    worker threads.
    """

    def __init__(self, session: Session, fs: Filesystem, failures: Failures, gates: Gates) -> None:
        self._session = session
        self._fs = fs
        self._failures = failures
        self._gates = gates

    async def write_back(self, ino: Ino, *, has_mutex: bool = False) -> None:
        """Have the kernel write back a file's dirty pages. The pages stay mapped.

        A supervisor without root cannot open a file without a name. The pages of such a file are revoked
        instead, which includes the write-back, and the processes with pages present are remembered.
        ``has_mutex``: True if the caller holds ``mf_mutex``.
        """
        path = self._fs.names.path_bytes(ino)
        if not await trio.to_thread.run_sync(self._session.write_back, ino, path):
            await self._failures.revoke_latent(incidents.of_file(self._fs, ino), has_mutex=has_mutex)

    async def refresh_attributes(self, ino: Ino) -> None:
        """Have the kernel request size and times of a file again. Wait for the end of that request."""
        self._session.forget_attributes(ino)
        path = self._fs.names.path_bytes(ino)
        await trio.to_thread.run_sync(self._session.refresh_attributes, ino, path)

    # -- under the invalidate lock

    @contextmanager
    def invalidate_lock(self) -> Iterator[InvalidateLock]:
        """Hold the invalidate lock (``mapping->invalidate_lock``) and suspend layouts during the context."""
        lock = self._gates.invalidating = InvalidateLock()
        with self._fs.layouts.suspended():  # C would answer requests that must wait
            try:
                yield lock
            finally:
                self._gates.invalidating = None
                lock.release()

    async def revoke(self, lock: InvalidateLock, ino: Ino, part: Range) -> None:
        """Lock the bytes ``part`` of a file, and revoke all pages under the lock.

        Raises FsError EAGAIN if the revoke takes too long.
        """
        await lock.invalidate(self._session.revoke, [(ino, part)])

    async def write_back_locked(self, lock: InvalidateLock, ino: Ino) -> None:
        """Have the kernel write back a file's dirty pages once. Precondition: the caller holds ``lock``."""
        path = self._fs.names.path_bytes(ino)
        await lock.while_held(ino, partial(self._session.write_back, ino, path))
