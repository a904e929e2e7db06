"""Release of blocks that no file owns any longer: at once, or piece by piece by a task of the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Reclaimer:
    """Link from the queues of blocks (Allocator, InodeGc) to the filesystem and to the host's task.

    ``reclaim`` commits, and frees the blocks of unlinked files and the pending blocks. ``backlog`` returns
    the number of blocks of unlinked files.
    """

    def __init__(
        self, reclaim: Callable[[], None] | None = None, backlog: Callable[[], int] = lambda: 0
    ) -> None:
        self._reclaim = reclaim
        self._backlog = backlog
        self._wake: Callable[[], None] | None = None

    @property
    def has_task(self) -> bool:
        """True while a task of the host releases blocks. Without a task, blocks are released at once."""
        return self._wake is not None

    @contextmanager
    def served(self, wake: Callable[[], None]) -> Iterator[None]:
        """Context in which a task of the host releases blocks. ``wake`` is called when blocks are queued.

        The task then calls Filesystem.inactivate() and Allocator.drain() until each returns False.
        """
        self._wake = wake
        try:
            yield
        finally:
            self._wake = None

    def wake(self) -> None:
        """Wake the task, if any."""
        if self._wake is not None:
            self._wake()

    @property
    def backlog(self) -> int:
        """Number of blocks of unlinked files, which :meth:`reclaim` frees."""
        return self._backlog()

    def reclaim(self) -> bool:
        """Commit and free all blocks without an owner. Return False if nothing can do so."""
        if self._reclaim is None:
            return False
        self._reclaim()
        return True
