"""Sparse memory-mapped arrays of a strategy, beside the device. The arrays survive kill -9.

Elements never stored read as zero and take no memory. Indexes and lengths are elements.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
from crc32c import crc32c
from mmap_ninja import numpy as ninja

from daxemu.errors import NoSpace, NotADevice
from daxemu.pmem.backing import fallocate
from daxemu.private_path import PrivatePath
from daxemu.ranges import Range
from daxemu.uapi import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, PAGE_SIZE, page_align_down, page_align_up
from daxemu.units import DIV_ROUND_UP

Array = np.ndarray[Any, Any]
DISCARDED = 32 << 20
"""Bytes of memory that are given back to the host in one step: 5 ms."""


class SparseArray:
    """A mmap_ninja array of one dimension.

    Elements are read with pread(2), because a load from a hole of a mapped tmpfs file allocates memory.
    Elements are stored only after fallocate(2), because a store that finds the host filesystem full raises
    SIGBUS.
    """

    def __init__(self, path: PrivatePath, dtype: str, length: int) -> None:
        """Open the array at ``path``, or create the array.

        Raises NotADevice for a damaged or different array, NoSpace.
        """
        try:
            if not path.exists():
                path.mkdir()
                # The public constructors of mmap_ninja would write every element.
                with path.reachable() as by_fd:
                    ninja._empty(by_fd, dtype, (length,), "C")
                path.adopt()
            path.audit()
            with path.reachable() as by_fd:
                self._array: Array = ninja.open_existing(by_fd, mode="r+").view(np.ndarray)
            self._fd = (path / "data.ninja").open(os.O_RDWR)
        except OSError as error:
            raise NoSpace(f"{path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, OverflowError, struct.error) as error:
            raise NotADevice(
                f"{path} is damaged: expected an array of {length} items; remove it and mount again"
            ) from error
        if self._array.shape != (length,) or self._array.dtype != np.dtype(dtype):
            raise NotADevice(f"{path} has another size: remove it and mount again")
        self._item = self._array.dtype.itemsize

    def __len__(self) -> int:
        return len(self._array)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def get(self, part: Range) -> Array:
        """Return a copy of the elements ``part``."""
        found = os.pread(self._fd, part.length * self._item, part.start * self._item)
        return np.frombuffer(found, self._array.dtype).copy()

    def set(self, start: int, values: Array) -> None:
        """Store ``values`` from element ``start`` on. Raises NoSpace; then no element has changed."""
        self._reserve(Range(start, start + len(values)))
        self._array[start : start + len(values)] = values

    def fill(self, part: Range, value: int) -> None:
        """Store ``value`` into all elements of ``part``. Raises NoSpace; then no element has changed."""
        if value:
            self._reserve(part)
            self._array[part.start : part.end] = value
        else:
            self._clear(part)

    def _reserve(self, part: Range) -> None:
        try:
            os.posix_fallocate(self._fd, part.start * self._item, max(1, part.length * self._item))
        except OSError as error:
            raise NoSpace(f"no memory for the repair strategy's arrays: {error.strerror}") from error

    def _clear(self, part: Range) -> None:
        """Zero ``part``: punch whole pages, and store only to elements that are not zero elsewhere."""
        start, end = part.start * self._item, part.end * self._item
        whole = Range(page_align_up(start), page_align_down(end))
        if whole:
            fallocate(self._fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, whole.start, whole.length)
            edges = [Range(start, whole.start), Range(whole.end, end)]
        else:
            edges = [Range(start, end)]
        for edge in edges:
            if edge and any(os.pread(self._fd, edge.length, edge.start)):
                self._array[edge.start // self._item : edge.end // self._item] = 0

    def stored(self) -> Iterator[Range]:
        """Yield the runs of elements that may differ from zero.

        The cost grows with the stored data, not the length.
        """
        end = 0
        while True:
            try:
                start = os.lseek(self._fd, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            end = os.lseek(self._fd, start, os.SEEK_HOLE)
            yield Range(start // self._item, min(len(self), DIV_ROUND_UP(end, self._item)))

    def nonzero(self) -> Iterator[Range]:
        """Yield the runs of elements that are not zero."""
        for part in self.stored():
            for low in range(part.start, part.end, 1 << 20):
                chunk = Range(low, min(part.end, low + (1 << 20)))
                flags = np.concatenate(([0], (self.get(chunk) != 0).view(np.int8), [0]))
                edges = np.flatnonzero(np.diff(flags)) + chunk.start
                for first, last in edges.reshape(-1, 2).tolist():
                    yield Range(first, last)

    def space_bytes(self) -> int:
        """Return the allocated size in bytes."""
        return os.fstat(self._fd).st_blocks * 512


class Checksums:
    """CRC32C of pieces of ``unit`` bytes. The checksum of zeros is 0, so zeros need no stored checksum."""

    def __init__(self, unit: int) -> None:
        self._unit = unit
        self._zero = crc32c(bytes(unit))

    def of(self, data: bytes | memoryview) -> Array:
        """Return the checksum of each piece of ``data``."""
        view, step = memoryview(data), self._unit
        sums = [crc32c(view[at : at + step]) ^ self._zero for at in range(0, len(view), step)]
        return np.array(sums, np.uint32)

    def match(self, data: bytes | memoryview, wanted: int) -> bool:
        """Return True if the piece ``data`` has the checksum ``wanted``."""
        return crc32c(data) ^ self._zero == wanted


def discard(path: PrivatePath) -> Iterator[None]:
    """Remove a file, or all files below a directory. Yields after each DISCARDED bytes."""
    with suppress(OSError):
        if stat.S_ISDIR(path.lstat().st_mode):
            for name in path.names():
                yield from discard(path / name)
        else:
            yield from _empty(path)
        path.remove()
        yield


def _empty(path: PrivatePath) -> Iterator[None]:
    fd = path.open(os.O_RDWR)
    try:
        at = os.fstat(fd).st_size
        while at > 0 and (data := os.fstat(fd).st_blocks * 512) > DISCARDED:
            # Of a sparse file, as much as would be DISCARDED bytes on the average.
            at = max(0, at - max(PAGE_SIZE, at * DISCARDED // data))
            os.ftruncate(fd, at)
            yield
    finally:
        os.close(fd)
