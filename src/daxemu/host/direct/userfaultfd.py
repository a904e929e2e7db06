"""userfaultfd."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from typing import NamedTuple

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class PageFault(NamedTuple):
    """Page fault."""

    address: int
    is_write: bool
    is_wp: bool
    tid: int


class Remapped(NamedTuple):
    """mremap."""

    old: int
    new: int
    length: int


_ZERO = mmap.mmap(-1, 4096)
_ZERO_AT = ctypes.addressof(ctypes.c_char.from_buffer(_ZERO))


def _ioc(d: int, n: int, s: int) -> int:
    return d << 30 | s << 16 | 0xAA << 8 | n


class Userfaultfd:
    """A userfaultfd."""

    FEATURES = 1 | 2 | 4 | 1 << 5 | 1 << 8 | 1 << 11 | 1 << 12 | 1 << 14

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def make(cls) -> Userfaultfd:
        fd = _libc.syscall(323, os.O_CLOEXEC | os.O_NONBLOCK)
        raw = bytearray(struct.pack("=QQQ", 0xAA, cls.FEATURES, 0))
        fcntl.ioctl(fd, _ioc(3, 0x3F, 24), raw, True)
        return cls(fd)

    def register(self, start: int, length: int, missing: bool = True, wp: bool = True) -> None:
        fcntl.ioctl(
            self.fd,
            _ioc(3, 0, 32),
            bytearray(struct.pack("=QQQQ", start, length, missing | wp << 1, 0)),
            True,
        )

    def write_protect(self, start: int, length: int, on: bool, wake: bool = True) -> None:
        mode = 1 if on else 0 if wake else 2
        fcntl.ioctl(self.fd, _ioc(3, 6, 24), bytearray(struct.pack("=QQQ", start, length, mode)), True)

    def copy_zeros(self, start: int, length: int, wp: bool) -> None:
        fcntl.ioctl(
            self.fd,
            _ioc(3, 3, 40),
            bytearray(struct.pack("=QQQQq", start, _ZERO_AT, length, 2 if wp else 0, 0)),
            True,
        )

    def poison(self, start: int, length: int) -> None:
        fcntl.ioctl(self.fd, _ioc(3, 8, 32), bytearray(struct.pack("=QQQq", start, length, 0, 0)), True)

    def wake(self, start: int, length: int) -> None:
        fcntl.ioctl(self.fd, _ioc(2, 2, 16), bytearray(struct.pack("=QQ", start, length)), True)

    def read(self) -> list[PageFault | Remapped]:
        try:
            raw = os.read(self.fd, 32 * 64)
        except BlockingIOError:
            return []
        found: list[PageFault | Remapped] = []
        for kind, *_, a, b, c in struct.iter_unpack("=BBHIQQQ", raw):
            if kind == 0x12:
                found.append(PageFault(b, bool(a & 1), bool(a & 2), c & 0xFFFFFFFF))
            elif kind == 0x14:
                found.append(Remapped(a, b, c))
        return found
