"""Background release of the blocks of deleted files and of pending blocks, a piece in each step.

See fs/inodegc.py and Allocator.drain().
"""

from __future__ import annotations

from contextlib import suppress

import trio

from daxemu.errors import Shutdown
from daxemu.fs.filesystem import MAX_PENDING, Filesystem


class Reclaim:
    """Background task of one mounted filesystem."""

    def __init__(self, fs: Filesystem) -> None:
        self._fs = fs
        self._wanted = trio.Event()

    async def run(self) -> None:
        """Release blocks until cancelled. After that the filesystem releases blocks at once."""
        fs = self._fs
        with fs.reclaimer.served(self._wake):
            while True:
                await self._wanted.wait()
                self._wanted = trio.Event()
                while fs.inactivate():
                    await trio.lowlevel.checkpoint()
                if fs.allocator.pending_blocks >= MAX_PENDING:
                    with suppress(Shutdown):
                        fs.fsync()
                while fs.allocator.drain():
                    await trio.lowlevel.checkpoint()

    def _wake(self) -> None:
        self._wanted.set()
