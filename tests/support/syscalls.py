"""System calls that Python's ``os`` lacks, and daxemu's ioctls."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from pathlib import Path
from typing import NamedTuple

from daxemu.host.fuse.extra_operations import (
    CLONE_RANGE,
    DAXEMU_IOC_CLONE_RANGE,
    DAXEMU_IOC_MAP,
    MAP_EXTENT,
    MAP_HEADER,
    MAP_ROOM,
)

KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE, UNSHARE_RANGE = 1, 2, 8, 16, 32, 64
RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
AT_SYMLINK_FOLLOW = 0x400
_AT_FDCWD = -100
MAX_HANDLE_SZ = 128
_HANDLE = struct.Struct("=Ii")  # linux/fcntl.h: struct file_handle, less its bytes

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)


class Extent(NamedTuple):
    """Extent as returned by DAXEMU_IOC_MAP."""

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


def link_open_file(fd: int, path: Path) -> None:
    """``linkat(2)`` of an open file, which may have no name."""
    source = b"/proc/self/fd/%d" % fd
    _check(_libc.linkat(_AT_FDCWD, source, _AT_FDCWD, os.fsencode(path), AT_SYMLINK_FOLLOW))


class _Dirent(ctypes.Structure):
    """``struct dirent`` of 64-bit glibc and musl."""

    _fields_ = (
        ("d_ino", ctypes.c_uint64),
        ("d_off", ctypes.c_int64),
        ("d_reclen", ctypes.c_uint16),
        ("d_type", ctypes.c_uint8),
        ("d_name", ctypes.c_char * 256),
    )


_libc.opendir.restype = _libc.readdir.restype = ctypes.c_void_p
_libc.opendir.argtypes = (ctypes.c_char_p,)
_libc.readdir.argtypes = _libc.closedir.argtypes = (ctypes.c_void_p,)
_libc.seekdir.argtypes = (ctypes.c_void_p, ctypes.c_long)


def page_of(directory: Path, cookie: int, count: int) -> list[tuple[str, int]]:
    """Return up to ``count`` entries behind a cookie, with the cookie of each, on a new handle."""
    handle = _libc.opendir(os.fsencode(directory))
    if not handle:
        _check(-1)
    found: list[tuple[str, int]] = []
    try:
        if cookie:
            _libc.seekdir(handle, cookie)
        while len(found) < count and (entry := _libc.readdir(handle)):
            dirent = ctypes.cast(entry, ctypes.POINTER(_Dirent)).contents
            found.append((os.fsdecode(dirent.d_name), dirent.d_off))
    finally:
        _libc.closedir(handle)
    return found


def clone_range(target: int, source: int, offset: int = 0, length: int = 0, target_offset: int = 0) -> None:
    """daxemu's FICLONERANGE."""
    fcntl.ioctl(target, DAXEMU_IOC_CLONE_RANGE, CLONE_RANGE.pack(source, offset, length, target_offset))


def extent_map(fd: int, start: int = 0, length: int = 0) -> list[Extent]:
    """daxemu's FIEMAP: at most MAP_ROOM extents of the range."""
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
    """``open_by_handle_at(2)``, for root; ``mount`` is a descriptor of any file of the mount."""
    fd: int = _libc.open_by_handle_at(mount, handle, flags)
    if fd < 0:
        _check(fd)
    return fd
