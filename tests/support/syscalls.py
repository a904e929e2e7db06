"""System calls that Python's ``os`` does not have, and our ioctls."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from pathlib import Path
from typing import NamedTuple

from daxemu.host.extra_operations import (
    CLONE_RANGE,
    DAXEMU_IOC_CLONE_RANGE,
    DAXEMU_IOC_MAP,
    MAP_EXTENT,
    MAP_HEADER,
    MAP_ROOM,
)

KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE, UNSHARE_RANGE = 1, 2, 8, 16, 32, 64
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
_AT_FDCWD = -100
MAX_HANDLE_SZ = 128
_HANDLE = struct.Struct("=Ii")  # linux/fcntl.h: struct file_handle, less its bytes

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)


class Extent(NamedTuple):
    """One extent as DAXEMU_IOC_MAP answers it."""

    offset: int
    device_offset: int
    length: int
    shared_by: int
    poisoned: int


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """``fallocate(2)``."""
    _check(_libc.fallocate(fd, mode, offset, length))


def renameat2(old: Path, new: Path, flags: int) -> None:
    """``renameat2(2)``."""
    _check(_libc.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags))


def clone_range(target: int, source: int, offset: int = 0, length: int = 0, target_offset: int = 0) -> None:
    """Our FICLONERANGE."""
    fcntl.ioctl(target, DAXEMU_IOC_CLONE_RANGE, CLONE_RANGE.pack(source, offset, length, target_offset))


def extent_map(fd: int, start: int = 0, length: int = 0) -> list[Extent]:
    """Our FIEMAP: at most MAP_ROOM extents of the range."""
    buffer = bytearray(MAP_HEADER.size + MAP_ROOM * MAP_EXTENT.size)
    MAP_HEADER.pack_into(buffer, 0, start, length, 0, 0)
    fcntl.ioctl(fd, DAXEMU_IOC_MAP, buffer)
    count = MAP_HEADER.unpack_from(buffer)[2]
    assert not any(buffer[MAP_HEADER.size + count * MAP_EXTENT.size :])
    return [
        Extent(*MAP_EXTENT.unpack_from(buffer, MAP_HEADER.size + i * MAP_EXTENT.size)) for i in range(count)
    ]


def name_to_handle(path: Path) -> bytes:
    """``name_to_handle_at(2)``: a ``struct file_handle``."""
    handle = ctypes.create_string_buffer(_HANDLE.pack(MAX_HANDLE_SZ, 0), _HANDLE.size + MAX_HANDLE_SZ)
    mount_id = ctypes.c_int()
    _check(_libc.name_to_handle_at(_AT_FDCWD, os.fsencode(path), handle, ctypes.byref(mount_id), 0))
    return handle.raw


def open_by_handle(mount: int, handle: bytes, flags: int) -> int:
    """``open_by_handle_at(2)``, for root; ``mount`` is a descriptor of anything there."""
    fd: int = _libc.open_by_handle_at(mount, handle, flags)
    if fd < 0:
        _check(fd)
    return fd
