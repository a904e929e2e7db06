"""The memmap's arrays on disk: made, found, read and backed with memory (mm/sparse-vmemmap.c's business).

Three mmap_ninja arrays in one directory, mapped by the machine and by whoever walks them from outside.
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

PAGES_PER_SECTION = 1 << 15
MAX_SPANS = 64
SPAN_FIELDS = 5

Array = np.ndarray[Any, Any]


def _array(at: PrivatePath, dtype: str, shape: tuple[int, ...]) -> Array:
    """A new array of zeros that takes no room. mmap_ninja's own public constructors write every element."""
    at.mkdir()
    with at.reachable() as path:
        array: Array = ninja._empty(path, dtype, shape, "C")
    at.adopt()
    return array


def _open(at: PrivatePath, mode: str, dtype: str, dimensions: int) -> Array:
    """An array as a plain one: np.memmap's own indexing costs ten times as much. Raises FileNotFoundError,
    NotADevice.
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
    return NotADevice(f"{at} is damaged: unmount the device and mount it again, which makes it anew")


def _reserve(fd: int, start: int, length: int) -> None:
    os.posix_fallocate(fd, start, length)


class MemmapArrays:
    """The arrays of pfns ``[base, end)``, section boundaries both.

    ``pages`` is sparse. It is read with read(2), because a load from a hole of a mapped tmpfs file takes
    memory; it is stored to only where memory was reserved, because a store that finds none is a SIGBUS.
    """

    def __init__(self, directory: PrivatePath, *, writable: bool) -> None:
        """Raises FileNotFoundError when there are none."""
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
        """Raises NotADevice unless each array has the values that a machine gives it."""
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
        """Arrays of zeros with room for ``pages``, in the place of what is there. Raises NoSpace."""
        base = pages.start // PAGES_PER_SECTION
        sections = -(-pages.end // PAGES_PER_SECTION) - base
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
            # Whoever has the old ones mapped keeps them, whole; these are other files.
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
        """Those of a machine that is running, to look at. Raises FileNotFoundError when there are none."""
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
        """Let go of the files."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def discard(self) -> None:
        """Remove the files; those who look at them now are not disturbed."""
        self.close()
        with suppress(OSError):
            self._directory.rmtree()

    def read(self, part: Range) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """A copy of elements of ``pages``."""
        return np.frombuffer(os.pread(self._fd, part.length, part.start), np.uint8)

    def have(self, part: Range) -> bool:
        """Back elements of ``pages`` with memory before they are stored to; whether there is any."""
        try:
            _reserve(self._fd, part.start, part.length)
        except OSError:
            return False
        return True

    def clear(self, part: Range) -> None:
        """Zero elements of ``pages``; touches only those that are not."""
        found = np.flatnonzero(self.read(part))
        if len(found):
            self.pages[found + part.start] = 0


def pages_of(section: int) -> Range:
    """The elements of ``pages`` that belong to a section."""
    return Range(section * PAGES_PER_SECTION, (section + 1) * PAGES_PER_SECTION)
