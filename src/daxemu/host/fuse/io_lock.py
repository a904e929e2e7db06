"""I/O lock of files (XFS_IOLOCK_EXCL with XFS_MMAPLOCK_EXCL): a verb in pieces excludes reads and writes of a
file, and other verbs on its extents.

The invalidate lock lets a request through where a revoke may wait for the request. A claim of the I/O lock
lets no request through: between two pieces a verb needs no answer to a request of the kernel.
"""

from __future__ import annotations

from collections.abc import Collection

import trio

from daxemu.uapi import Ino


class Claim:
    """Exclusive use of some files, from :meth:`IoLock.claim` to :meth:`end`. As an async context: waits for
    earlier claims first, and ends the claim.
    """

    def __init__(self, claims: list[Claim], inos: frozenset[Ino], readable: frozenset[Ino]) -> None:
        self._claims = claims
        self.inos = inos
        self.unreadable = inos - readable
        self._earlier = [other for other in claims if other.inos & inos]
        self.over = trio.Event()
        claims.append(self)

    @property
    def is_first(self) -> bool:
        """True if no earlier claim of any of the files is left."""
        return all(other.over.is_set() for other in self._earlier)

    def end(self) -> None:
        """Let the next claims, reads and writes go on."""
        self._claims.remove(self)
        self.over.set()

    async def __aenter__(self) -> None:
        try:
            for other in self._earlier:
                await other.over.wait()
        except BaseException:
            self.end()
            raise

    async def __aexit__(self, *exc: object) -> None:
        self.end()


class IoLock:
    """Claims on files, in order of arrival. Belongs to the trio thread."""

    def __init__(self) -> None:
        self._claims: list[Claim] = []

    def is_held(self, *inos: Ino) -> bool:
        """Return True if any of the files is claimed."""
        return any(claim.inos.intersection(inos) for claim in self._claims)

    def claim(self, *inos: Ino, readable: Collection[Ino] = ()) -> Claim:
        """Claim files. Later claims and writes of these files wait from now on, and reads of all files but
        ``readable``.
        """
        return Claim(self._claims, frozenset(inos), frozenset(readable))

    async def before_read(self, ino: Ino) -> None:
        """Wait until bytes of a file may be read."""
        while claim := next((claim for claim in self._claims if ino in claim.unreadable), None):
            await claim.over.wait()

    async def before_write(self, ino: Ino) -> None:
        """Wait until bytes of a file may be written."""
        while claim := next((claim for claim in self._claims if ino in claim.inos), None):
            await claim.over.wait()
