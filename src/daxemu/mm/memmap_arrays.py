"""The memmap's arrays on disk: create, open, read and allocate (counterpart of mm/sparse-vmemmap.c).

Three mmap_ninja arrays in one directory. The supervisor maps the arrays writable, walkers in other processes
map them read-only.
"""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from operator import itemgetter
from typing import Any

import numpy as np
from mmap_ninja import numpy as ninja

from daxemu.errors import NoSpace, NotADevice
from daxemu.mm.pfn_kinds import Use
from daxemu.private_path import PrivatePath
from daxemu.ranges import Range
from daxemu.uapi import Pfn
from daxemu.units import DIV_ROUND_UP

PAGES_PER_SECTION = 1 << 15
MAX_SPANS = 64
SPAN_FIELDS = 5

Array = np.ndarray[Any, Any]


def _array(at: PrivatePath, dtype: str, shape: tuple[int, ...]) -> Array:
    """Create a sparse array of zeros. The public constructors of mmap_ninja would write every element."""
    at.mkdir()
    with at.reachable() as path:
        array: Array = ninja._empty(path, dtype, shape, "C")
    at.adopt()
    return array


def _open(at: PrivatePath, mode: str, dtype: str, dimensions: int) -> Array:
    """Open an array as a plain ndarray: indexing of np.memmap costs ten times as much.

    Raises FileNotFoundError, and NotADevice for a damaged file.
    """
    at.audit()
    try:
        # A shape beyond all memory: numpy would warn, and then refuse.
        with at.reachable() as path, np.errstate(over="ignore"):
            array: Array = ninja.open_existing(path, mode=mode).view(np.ndarray)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, OverflowError, struct.error) as error:
        raise _damaged(at) from error
    if array.dtype != np.dtype(dtype) or array.ndim != dimensions:
        raise _damaged(at)
    return array


def _damaged(at: PrivatePath) -> NotADevice:
    return NotADevice(f"{at} is damaged: unmount the device and mount it again to create the file anew")


def _reserve(fd: int, start: int, length: int) -> None:
    os.posix_fallocate(fd, start, length)


class MemmapArrays:
    """The arrays of pfns ``[base, end)``; both are section boundaries.

    ``pages`` is a sparse file. Elements are read with pread(2), because a load from a hole of a mapped tmpfs
    file allocates memory. Elements are stored only after fallocate(2), because a store that finds the host
    filesystem full raises SIGBUS.
    """

    def __init__(self, directory: PrivatePath, *, writable: bool) -> None:
        """Open the arrays in ``directory``. Raises FileNotFoundError, and NotADevice for a damaged file."""
        mode = "r+" if writable else "r"
        self._directory = directory
        self.spans = _open(directory / "spans", mode, "int64", 2)
        self.sections = _open(directory / "sections", mode, "uint8", 1)
        self.pages = _open(directory / "pages", mode, "uint8", 1)
        self._check()
        self.base: Pfn = int(self.spans[MAX_SPANS, 0])
        self.end: Pfn = self.base + len(self.pages)
        self._fd = (directory / "pages" / "data.ninja").open(os.O_RDWR if writable else os.O_RDONLY)

    def _check(self) -> None:
        """Check shapes and values. Raises NotADevice for an array that no supervisor can have written."""
        if self.spans.shape != (MAX_SPANS + 1, SPAN_FIELDS):
            raise _damaged(self._directory / "spans")
        if len(self.pages) != len(self.sections) * PAGES_PER_SECTION:
            raise _damaged(self._directory / "pages")
        base = int(self.spans[MAX_SPANS, 0])
        end = base + len(self.pages)
        if base < 0 or base % PAGES_PER_SECTION:
            raise _damaged(self._directory / "spans")
        at = base
        for use, first, last, data, initialised in sorted(self.spans[:MAX_SPANS].tolist(), key=itemgetter(1)):
            if use == Use.UNUSED:
                continue
            if use not in set(Use) or not at <= first <= last <= end:
                raise _damaged(self._directory / "spans")
            if use == Use.DEVICE and not first <= data <= initialised <= last:
                raise _damaged(self._directory / "spans")
            at = last

    @classmethod
    def create(cls, directory: PrivatePath, pages: Range) -> MemmapArrays:
        """Create arrays of zeros for the pfns ``pages``; replace existing arrays. Raises NoSpace."""
        base = pages.start // PAGES_PER_SECTION
        sections = DIV_ROUND_UP(pages.end, PAGES_PER_SECTION) - base
        scratch = directory.with_name(directory.name + ".new")
        try:
            scratch.rmtree()
            for name, dtype, shape in (
                ("spans", "int64", (MAX_SPANS + 1, SPAN_FIELDS)),
                ("sections", "uint8", (sections,)),
                ("pages", "uint8", (sections * PAGES_PER_SECTION,)),
            ):
                array = _array(scratch / name, dtype, shape)
                if name != "pages":
                    fd = (scratch / name / "data.ninja").open(os.O_RDWR)
                    try:
                        _reserve(fd, 0, array.nbytes)
                    finally:
                        os.close(fd)
                if name == "spans":
                    array[MAX_SPANS, 0] = base * PAGES_PER_SECTION
            # A walker that has the old arrays mapped keeps those files, unchanged.
            directory.rmtree()
            scratch.rename(directory.name)
        except OSError as error:
            with suppress(OSError):
                scratch.rmtree()
            raise NoSpace(
                f"{directory}: no room for the struct pages ({error.strerror}); make room there"
            ) from error
        return cls(directory, writable=True)

    @classmethod
    def open(cls, directory: PrivatePath) -> MemmapArrays:
        """Open the arrays of a running machine read-only.

        Raises FileNotFoundError if no arrays exist, NotADevice for a damaged file.
        """
        while True:
            found = directory.lstat().st_ino
            with suppress(FileNotFoundError):
                arrays = cls(directory, writable=False)
                if directory.lstat().st_ino == found:
                    return arrays
                arrays.close()
            if directory.lstat().st_ino == found:
                raise FileNotFoundError(str(directory))

    def close(self) -> None:
        """Close the file descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def discard(self) -> None:
        """Remove the files. A process that has the files open keeps reading the old content."""
        self.close()
        with suppress(OSError):
            self._directory.rmtree()

    def read(self, part: Range) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return a copy of the elements ``part`` of ``pages``."""
        return np.frombuffer(os.pread(self._fd, part.length, part.start), np.uint8)

    def reserve(self, part: Range) -> bool:
        """Allocate the elements ``part`` of ``pages`` before a store. Return False if no memory is left."""
        try:
            _reserve(self._fd, part.start, part.length)
        except OSError:
            return False
        return True

    def clear(self, part: Range) -> None:
        """Zero the elements ``part`` of ``pages``. Stores only to elements that are not zero."""
        found = np.flatnonzero(self.read(part))
        if len(found):
            self.pages[found + part.start] = 0


def pages_of(section: int) -> Range:
    """Return the elements of ``pages`` that belong to ``section``."""
    return Range(section * PAGES_PER_SECTION, (section + 1) * PAGES_PER_SECTION)
