"""userfaultfd(2): typed requests, events as values, and a probe of the features of the kernel.

Purpose: no policy. Each failure of the kernel is one of ``host.direct.errors``, or else an OSError.
Reference in Linux: uapi/linux/userfaultfd.h, Documentation/admin-guide/mm/userfaultfd.rst.

Invariants: no function waits, except for locks of the kernel (mmap_lock of the address space).
``write_protect`` over much memory takes milliseconds (24 ms for 1 GiB of present pages): callers use a worker
thread.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from enum import IntFlag
from typing import NamedTuple, NoReturn

from daxemu.errors import Unsupported
from daxemu.host.direct import structs
from daxemu.host.direct.errors import (
    AddressSpaceChanging,
    AddressSpaceGone,
    NotRegistered,
    NotWritable,
    PagePresent,
    RegisteredElsewhere,
)
from daxemu.host.direct.syscalls import NR_USERFAULTFD
from daxemu.uapi import PAGE_SIZE


class Feature(IntFlag):
    """UFFD_FEATURE_*: the members that direct mappings use."""

    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    THREAD_ID = 1 << 8
    EXACT_ADDRESS = 1 << 11
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    POISON = 1 << 14


NEEDED = (
    Feature.PAGEFAULT_FLAG_WP
    | Feature.EVENT_FORK
    | Feature.EVENT_REMAP
    | Feature.MISSING_SHMEM
    | Feature.THREAD_ID
    | Feature.EXACT_ADDRESS
    | Feature.WP_HUGETLBFS_SHMEM
    | Feature.POISON
)
"""Features without which direct mappings are Unsupported. All are in Linux 6.6."""

OUTSIDE = NEEDED | Feature.EVENT_UNMAP
"""Features of the userfaultfd of mappings outside the zone, since Linux 4.11."""

_API_VERSION = 0xAA
_FLAG_WRITE = 1 << 0
_FLAG_WP = 1 << 1
_MODE_MISSING = 1 << 0
_MODE_WP = 1 << 1
_DONTWAKE = 1 << 0  # of UFFDIO_COPY and UFFDIO_POISON
_COPY_WP = 1 << 1
_WP_ON = 1 << 0
_WP_DONTWAKE = 1 << 1
_MESSAGES = 64  # that one read(2) takes
_ZEROS = 1 << 20  # bytes of one UFFDIO_COPY

_NEVER_REGISTERED = 0x7FFF_FFFF_D000  # a page near the end of the address space
_DONE = struct.Struct("=q")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class PageFault(NamedTuple):
    """Thread ``tid`` waits for an answer: an access to byte ``address`` (virtual) of a registered range.

    ``is_wp``: the page is present, and write-protected. Otherwise the page is missing.
    """

    address: int
    is_write: bool
    is_wp: bool
    tid: int


class Forked(NamedTuple):
    """The address space was copied. ``fd``: userfaultfd of the copy, owned by the reader. The parent waits in
    fork(2) until this event is read.
    """

    fd: int


class Remapped(NamedTuple):
    """``length`` bytes moved from address ``old`` to ``new``."""

    old: int
    new: int
    length: int


class PagesRemoved(NamedTuple):
    """The pages from address ``start`` to ``end`` (exclusive) were discarded by madvise(2)."""

    start: int
    end: int


class Unmapped(NamedTuple):
    """The addresses from ``start`` to ``end`` (exclusive) were unmapped."""

    start: int
    end: int


Event = PageFault | Forked | Remapped | PagesRemoved | Unmapped


def _parse(message: bytes) -> Event:
    match message[0]:
        case structs.PAGEFAULT_EVENT:
            _, flags, address, tid = structs.PAGEFAULT.unpack(message)
            return PageFault(address, bool(flags & (_FLAG_WRITE | _FLAG_WP)), bool(flags & _FLAG_WP), tid)
        case structs.FORK_EVENT:
            return Forked(structs.FORK.unpack(message)[1])
        case structs.REMAP_EVENT:
            return Remapped(*structs.REMAP.unpack(message)[1:])
        case structs.REMOVE_EVENT:
            return PagesRemoved(*structs.REMOVE.unpack(message)[1:])
        case structs.UNMAP_EVENT:
            return Unmapped(*structs.REMOVE.unpack(message)[1:])
    raise Unsupported(f"userfaultfd: event {message[0]:#x} of the kernel is unknown")


class Userfaultfd:
    """A userfaultfd of an address space. Owns the descriptor ``fd``, which is non-blocking; -1 while closed.

    Addresses are virtual, in bytes. Every range is of whole pages; NotRegistered otherwise. Every request
    raises AddressSpaceGone if the address space has ended.
    """

    def __init__(self, fd: int = -1) -> None:
        self.fd = -1
        if fd >= 0:
            self.take(fd)

    def take(self, fd: int) -> None:
        """Own the descriptor ``fd`` from now on. Precondition: closed."""
        self.fd = fd
        os.set_blocking(fd, False)

    def enable(self, features: Feature = NEEDED) -> None:
        """Switch features on, once, before any other request. The userfaultfd of a fork has the features of
        its parent's. Raises Unsupported with the names of missing features.
        """
        request = bytearray(structs.API.pack(_API_VERSION, features, 0))
        try:
            fcntl.ioctl(self.fd, structs.UFFDIO_API, request, True)
        except OSError as error:
            if error.errno != errno.EINVAL:
                _fail(error, "UFFDIO_API", 0)
            lacking = ", ".join(missing(features)) or "userfaultfd is in use already"
            raise Unsupported(f"userfaultfd of this kernel lacks: {lacking}") from error

    def close(self) -> None:
        """Unregister all ranges and wake all threads that wait. Idempotent. A later request raises
        AddressSpaceGone: the number may be another file's by then.
        """
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def register(self, start: int, length: int, missing: bool = True, wp: bool = True) -> None:
        """Have faults reported: of missing pages, and of stores to write-protected pages.

        Raises RegisteredElsewhere, NotWritable for a shared mapping of a file opened for reading, and
        NotRegistered for addresses without a mapping.
        """
        mode = (_MODE_MISSING if missing else 0) | (_MODE_WP if wp else 0)
        self._ioctl("UFFDIO_REGISTER", structs.UFFDIO_REGISTER, structs.REGISTER.pack(start, length, mode, 0))

    def unregister(self, start: int, length: int) -> None:
        """End the reports of faults, and wake threads that wait."""
        self._ioctl("UFFDIO_UNREGISTER", structs.UFFDIO_UNREGISTER, structs.RANGE.pack(start, length))

    def write_protect(self, start: int, length: int, on: bool, wake: bool = True) -> None:
        """Write-protect a range, present or not, or end the protection; then ``wake`` threads that wait.

        Raises NotRegistered, and AddressSpaceChanging.
        """
        mode = _WP_ON if on else 0 if wake else _WP_DONTWAKE
        request = structs.WRITEPROTECT.pack(start, length, mode)
        self._ioctl("UFFDIO_WRITEPROTECT", structs.UFFDIO_WRITEPROTECT, request)

    def copy_zeros(self, start: int, length: int, wp: bool) -> None:
        """Map pages of zeros, with write protection if ``wp``, and wake threads that wait.

        Raises PagePresent, NotRegistered and AddressSpaceChanging.
        """
        mode = _COPY_WP if wp else 0
        done = 0
        while done < length:
            part = min(_ZEROS, length - done)
            request = structs.COPY.pack(start + done, _zeros(), part, mode, 0)
            done += self._fill("UFFDIO_COPY", structs.UFFDIO_COPY, request, part, done)

    def poison(self, start: int, length: int, wake: bool = True) -> None:
        """Make every later access to the pages fail: SIGBUS in user mode, EFAULT in kernel mode; wake threads
        that wait. The marker stays until madvise(MADV_DONTNEED).

        Raises PagePresent: end a write protection first, with ``wake=False``. Raises NotRegistered and
        AddressSpaceChanging.
        """
        mode, done = 0 if wake else _DONTWAKE, 0
        while done < length:
            request = structs.POISON.pack(start + done, length - done, mode, 0)
            done += self._fill("UFFDIO_POISON", structs.UFFDIO_POISON, request, length - done, done)

    def wake(self, start: int, length: int) -> None:
        """Wake threads that wait for a page of the range: each repeats its access."""
        self._ioctl("UFFDIO_WAKE", structs.UFFDIO_WAKE, structs.RANGE.pack(start, length))

    def read(self) -> list[Event]:
        """Return the events that have come, in order; none: an empty list. Never blocks."""
        try:
            raw = os.read(self.fd, _MESSAGES * structs.PAGEFAULT.size)
        except BlockingIOError:
            return []
        size = structs.PAGEFAULT.size
        return [_parse(raw[at : at + size]) for at in range(0, len(raw), size)]

    def _ioctl(self, name: str, number: int, packed: bytes) -> None:
        try:
            fcntl.ioctl(self._open_fd(), number, bytearray(packed), True)
        except OSError as error:
            what = f"{name} {_range(packed, 8)}"
            if error.errno == errno.ENOMEM and self._is_gone():
                raise AddressSpaceGone(what) from error
            _fail(error, what, 0)

    def _open_fd(self) -> int:
        if self.fd < 0:
            raise AddressSpaceGone("the address space of the userfaultfd has ended")
        return self.fd

    def _is_gone(self) -> bool:
        """Return True if the address space has ended, for which UFFDIO_REGISTER says ENOMEM, as for too many
        mappings (vm.max_map_count).
        """
        request = structs.WRITEPROTECT.pack(_NEVER_REGISTERED, PAGE_SIZE, _WP_DONTWAKE)
        try:
            fcntl.ioctl(self.fd, structs.UFFDIO_WRITEPROTECT, bytearray(request), True)
        except OSError as error:
            return error.errno == errno.ESRCH
        return False

    def _fill(self, name: str, number: int, packed: bytes, length: int, before: int) -> int:
        """Make a request that ends with the number of bytes done; return that number, which is not 0.

        The kernel says EAGAIN for any error after the first page: only the next request has the error itself.
        """
        request = bytearray(packed)
        try:
            fcntl.ioctl(self._open_fd(), number, request, True)
        except OSError as error:
            done = _DONE.unpack_from(request, len(request) - _DONE.size)[0]
            if error.errno == errno.EAGAIN and done > 0:
                return int(done)
            where = 16 if number == structs.UFFDIO_COPY else 8
            _fail(error, f"{name} {_range(packed, where)}", before)
        return length


def _range(packed: bytes, length_at: int) -> str:
    """Return the range of a request, whose length is at byte ``length_at``, for people."""
    start, length = struct.unpack_from("=Q", packed)[0], struct.unpack_from("=Q", packed, length_at)[0]
    return f"{start:#x}, {length} bytes"


def _fail(error: OSError, what: str, done: int) -> NoReturn:
    """Raise the error of ``host.direct.errors`` for the errno of a request."""
    text = f"{what}: {os.strerror(error.errno or 0)}"
    match error.errno:
        case errno.ESRCH:
            raise AddressSpaceGone(text) from error
        case errno.EAGAIN:
            raise AddressSpaceChanging(text, done) from error
        case errno.EEXIST:
            raise PagePresent(text, done) from error
        case errno.EINVAL | errno.ENOENT:
            raise NotRegistered(text) from error
        case errno.EBUSY:
            raise RegisteredElsewhere(text) from error
        case errno.EPERM:
            raise NotWritable(text) from error
    raise OSError(error.errno, text) from error


def _zeros() -> int:
    """Return the address of ``_ZEROS`` bytes of zeros in this process. The kernel's zero page: no memory."""
    global _zero_map
    if _zero_map is None:
        _zero_map = mmap.mmap(-1, _ZEROS, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return ctypes.addressof(ctypes.c_char.from_buffer(_zero_map))


_zero_map: mmap.mmap | None = None


def create() -> Userfaultfd:
    """Return a userfaultfd of this process, not enabled. Raises Unsupported without the right or the
    kernel.
    """
    fd = int(_libc.syscall(NR_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK))
    if fd >= 0:
        return Userfaultfd(fd)
    number = ctypes.get_errno()
    if number == errno.ENOSYS:
        raise Unsupported("userfaultfd: not in this kernel (CONFIG_USERFAULTFD)")
    if number == errno.EPERM:
        raise Unsupported("userfaultfd: not permitted: become root, or set vm.unprivileged_userfaultfd to 1")
    raise OSError(number, f"userfaultfd: {os.strerror(number)}")


def available() -> Feature:
    """Return the features of the kernel that direct mappings know. Raises Unsupported as :func:`create`."""
    probe = create()
    try:
        request = bytearray(structs.API.pack(_API_VERSION, 0, 0))
        fcntl.ioctl(probe.fd, structs.UFFDIO_API, request, True)
    finally:
        probe.close()
    known = Feature(0)
    for feature in Feature:
        known |= feature
    return Feature(structs.API.unpack(request)[1] & known)


def missing(needed: Feature = NEEDED) -> list[str]:
    """Return the names of needed features that the kernel lacks, in the order of their bits. Raises
    Unsupported as :func:`create`.
    """
    lacking = needed & ~available()
    return [f"UFFD_FEATURE_{feature.name}" for feature in Feature if feature in lacking]
