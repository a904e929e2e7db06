"""The files behind a device: memory for a range, holes, and runs of data."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator

from daxemu.errors import MediaError, NoSpace, Unsupported
from daxemu.ranges import Range
from daxemu.sizes import human
from daxemu.uapi import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE

FULL = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG)
"""Errors of a host without memory for a file."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def no_memory() -> NoSpace:
    """Return the error for a host without memory for the device."""
    return NoSpace("the memory behind the device is full: free some of /dev/shm or of the disk")


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Call ``fallocate(2)`` with any mode. Raises OSError."""
    while _libc.fallocate(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def reserve(fd: int, offset: int, length: int) -> None:
    """Back a range with memory. Raises NoSpace if the host has no memory left; then nothing is reserved."""
    try:
        fallocate(fd, 0, offset, length)
    except OSError as error:
        if error.errno in FULL:
            raise no_memory() from error
        raise MediaError(f"cannot reserve media: {error.strerror}") from error


def punch(fd: int, offset: int, length: int) -> None:
    """Make a range a hole. Every process that maps whole pages of the range loses the pages at once."""
    fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)


def data_runs(fd: int, start: int = 0) -> Iterator[Range]:
    """Yield the runs of the file, from byte ``start`` on, that have data, in order."""
    while True:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data behind ``start``
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield Range(start, end)
        start = end


def has_data(fd: int, part: Range) -> bool:
    """Return True if any page of the range has data."""
    first = next(data_runs(fd, part.start), None)
    return first is not None and first.start < part.end


def check_mappable(size: int) -> None:
    """Check that ``size`` bytes fit into the address space of a process. Raises Unsupported."""
    if not _is_mappable(size):
        raise too_large(size)


def _is_mappable(size: int) -> bool:
    try:
        mmap.mmap(-1, size, mmap.MAP_PRIVATE, mmap.PROT_READ).close()
    except OSError:
        return False
    return True


def too_large(size: int) -> Unsupported:
    """Return the error for a device of ``size`` bytes that cannot be mapped."""
    powers = (1 << bit for bit in range(size.bit_length() - 1, 0, -1))
    most = next(filter(_is_mappable, powers), 0)
    return Unsupported(
        f"a device of {human(size)} does not fit into the address space of a process on this machine: "
        f"the largest that does is {human(most)}"
    )
