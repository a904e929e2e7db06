"""Order of a directory's names in listings: by hash of the name (fs/ext4/dir.c, fs/ext4/hash.c).

The cookie of a name is computed from the name alone. So a listing can be resumed by a cookie on another
handle, after changes and after a remount, as NFS servers do, and no name that stayed is lost or repeated.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from sortedcontainers import SortedDict

from daxemu.uapi import Ino

DOT, DOT_DOT = 1, 2
"""Cookies of "." and ".."."""
_SLOTS = 16
"""Cookies for names with the same hash of 58 bits."""
MAX_LISTINGS = 64
"""Number of directories whose order is kept.

For other directories the next listing computes the order again.
"""


def cookie_of(name: bytes) -> int:
    """Return the first possible cookie of a name. Less than 2**62 + 16, because a file position is signed."""
    return (int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 6) * _SLOTS + _SLOTS


class Listing:
    """Names of one directory by cookie. Complete once :meth:`build` has returned True."""

    def __init__(self, names: Iterable[bytes]) -> None:
        self._by_cookie: SortedDict[int, bytes] = SortedDict()
        self._left: Iterator[bytes] | None = iter(list(names))

    @property
    def is_complete(self) -> bool:
        return self._left is None

    def build(self, count: int, is_there: Callable[[bytes], bool]) -> bool:
        """Add the next ``count`` names, except names removed meanwhile.

        Return True if all names are added.
        """
        if self._left is not None:
            part = list(islice(self._left, count))
            for name in filter(is_there, part):
                self.add(name)
            if len(part) < count:
                self._left = None
        return self.is_complete

    def add(self, name: bytes) -> None:
        """Add a name, unless present."""
        first = cookie_of(name)
        if self._cookie(first, name) is None:
            free = next(cookie for cookie in range(first, first + _SLOTS) if cookie not in self._by_cookie)
            self._by_cookie[free] = name

    def remove(self, name: bytes) -> None:
        """Remove a name, if present."""
        if (cookie := self._cookie(cookie_of(name), name)) is not None:
            del self._by_cookie[cookie]

    def _cookie(self, first: int, name: bytes) -> int | None:
        found: Iterator[int] = self._by_cookie.irange(first, first + _SLOTS - 1)
        return next((cookie for cookie in found if self._by_cookie[cookie] == name), None)

    def after(self, cookie: int) -> Iterator[tuple[int, bytes]]:
        """Yield the names after a cookie, with their cookies.

        The start costs the logarithm of the number of names.
        """
        for found in self._by_cookie.irange(cookie, inclusive=(False, True)):
            yield found, self._by_cookie[found]


class Listings:
    """Listings of the most recently read directories."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Ino, Listing] = OrderedDict()

    def of(self, ino: Ino, names: Iterable[bytes]) -> Listing:
        """Return the listing of a directory. ``names`` are the directory's names, for a new listing."""
        listing = self._kept.get(ino)
        if listing is None:
            self._make_room()
            listing = self._kept[ino] = Listing(names)
        self._kept.move_to_end(ino)
        return listing

    def _make_room(self) -> None:
        """Drop the least recently read listing that is complete.

        An incomplete listing stays: otherwise concurrent readers of many directories would drop each other's
        listings for ever.
        """
        if len(self._kept) >= MAX_LISTINGS:
            complete = (ino for ino, listing in self._kept.items() if listing.is_complete)
            if (oldest := next(complete, None)) is not None:
                del self._kept[oldest]

    def entered(self, ino: Ino, name: bytes) -> None:
        """Add a new name of a directory."""
        if (listing := self._kept.get(ino)) is not None:
            listing.add(name)

    def left(self, ino: Ino, name: bytes) -> None:
        """Remove a name of a directory."""
        if (listing := self._kept.get(ino)) is not None:
            listing.remove(name)

    def drop(self, ino: Ino) -> None:
        """Drop the listing of a removed directory."""
        self._kept.pop(ino, None)
