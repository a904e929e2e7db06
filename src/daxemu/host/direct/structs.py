"""Structs of uapi/linux/userfaultfd.h. ``agent.c`` exports sizes, offsets and numbers of the header."""

from __future__ import annotations

import struct

API = struct.Struct("=3Q")
RANGE = struct.Struct("=2Q")
REGISTER = struct.Struct("=4Q")
COPY = struct.Struct("=4Qq")
WRITEPROTECT = struct.Struct("=3Q")
POISON = struct.Struct("=3Qq")
PAGEFAULT = struct.Struct("=B7xQQI4x")
FORK = struct.Struct("=B7xI20x")
REMAP = struct.Struct("=B7x3Q")
REMOVE = struct.Struct("=B7x2Q8x")

SHARED = (API, RANGE, REGISTER, COPY, WRITEPROTECT, POISON, PAGEFAULT, FORK, REMAP, REMOVE)
"""In the order of daxemu_userfaultfd_layout in agent.c."""


def _ioctl(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | 0xAA << 8 | number


UFFDIO_API = _ioctl(3, 0x3F, API.size)
UFFDIO_REGISTER = _ioctl(3, 0x00, REGISTER.size)
UFFDIO_UNREGISTER = _ioctl(2, 0x01, RANGE.size)
UFFDIO_WAKE = _ioctl(2, 0x02, RANGE.size)
UFFDIO_COPY = _ioctl(3, 0x03, COPY.size)
UFFDIO_WRITEPROTECT = _ioctl(3, 0x06, WRITEPROTECT.size)
UFFDIO_POISON = _ioctl(3, 0x08, POISON.size)

NUMBERS = (
    UFFDIO_API,
    UFFDIO_REGISTER,
    UFFDIO_UNREGISTER,
    UFFDIO_WAKE,
    UFFDIO_COPY,
    UFFDIO_WRITEPROTECT,
    UFFDIO_POISON,
)
"""In the order of daxemu_userfaultfd_numbers in agent.c."""

PAGEFAULT_EVENT = 0x12
FORK_EVENT = 0x13
REMAP_EVENT = 0x14
REMOVE_EVENT = 0x15
UNMAP_EVENT = 0x16
