"""Loads the C supplement in front of pyfuse3, and decodes the supplement's bits in file handles.

Layout of a file handle in ``Operations``:

- bits 0-37: inode number, bit 38: opened for reading and writing, bit 39: opened for writing (from ``open``)
- bits 40-62: thread id of the caller (pid_max is at most 2**22)
- bit 63: the request is a write-back of the page cache

Without the supplement bits 40-63 are zero: no thread is known, and no write is known as a write-back.

Import this module before anything imports pyfuse3.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
from pathlib import Path
from typing import NamedTuple

from daxemu.host.c_layout import REBUILD, refusal
from daxemu.host.fuse import structs
from daxemu.uapi import Ino

_INO_MASK = (1 << 38) - 1
_MAPPABLE = 1 << 38
_WRITABLE = 1 << 39
_TID_SHIFT = 40
_TID_MASK = (1 << 23) - 1
_WRITEPAGE = 1 << 63
_VERSION = 6


class Caller(NamedTuple):
    """Decoded file handle: inode, access, calling thread (0: unknown), write-back of the page cache."""

    ino: Ino
    writable: bool
    tid: int
    from_cache: bool


def pack(ino: Ino, flags: int) -> int:
    """Return the file handle of an open file; ``flags`` of open(2)."""
    access = flags & os.O_ACCMODE
    return ino | (_WRITABLE if access != os.O_RDONLY else 0) | (_MAPPABLE if access == os.O_RDWR else 0)


def may_store_through_mapping(fh: int) -> bool:
    """Return whether mmap(2) accepts the handle for MAP_SHARED and PROT_WRITE."""
    return bool(fh & _MAPPABLE)


def unpack(fh: int) -> Caller:
    """Decode a file handle."""
    return Caller(fh & _INO_MASK, bool(fh & _WRITABLE), fh >> _TID_SHIFT & _TID_MASK, bool(fh & _WRITEPAGE))


def _find() -> Path | None:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_supplement{suffix}")
        if path.exists():
            return path
    return None


_library: ctypes.CDLL | None = None


def library() -> ctypes.CDLL:
    """Return the loaded supplement. Precondition: MISSING is None."""
    assert _library is not None
    return _library


def quick_library() -> ctypes.PyDLL:
    """Return the loaded supplement for short calls: the GIL stays held, so no other thread runs meanwhile.

    Precondition: MISSING is None.
    """
    return ctypes.PyDLL(library()._name)


def load() -> str | None:
    """Put the supplement in front of libfuse. Return None, or an error text for a missing supplement."""
    global _library
    path = _find()
    if path is None:
        return "supplement.c was not built: install libfuse3-dev, pkg-config and gcc, then daxemu again"
    try:
        loaded = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        version = ctypes.c_int.in_dll(loaded, "daxemu_supplement_version").value
    except (OSError, ValueError) as error:
        return f"{path.name} cannot be loaded: {error}"
    if version != _VERSION:
        return f"{path.name} is of version {version}, not {_VERSION}: install daxemu again"
    try:
        other = refusal(loaded, "daxemu_request_layout", *structs.REQUEST_LAYOUT)
        other = other or refusal(loaded, "daxemu_answers_layout", *structs.ANSWERS_LAYOUT)
    except ValueError as error:
        return f"{path.name} is of other sources ({error}): {REBUILD}"
    if other is not None:
        return f"{path.name}: {other}"
    _library = loaded
    return None


MISSING: str | None = load()
"""Reason for a missing supplement; None for a loaded one."""

READS: bool = _library is not None and bool(ctypes.c_int.in_dll(_library, "daxemu_reads").value)
"""True if requests come through host/fuse/answers.c, which needs libfuse 3.14."""

_touch = ctypes.c_int() if _library is None else ctypes.c_int.in_dll(_library, "daxemu_touch")
_kill_suidgid = ctypes.c_int() if _library is None else ctypes.c_int.in_dll(_library, "daxemu_kill_suidgid")


def kill_suidgid() -> bool:
    """Return whether the current request removes set-id bits (FUSE_HANDLE_KILLPRIV_V2).

    Valid at the beginning of a handler, before its first await. Without the supplement the kernel itself
    removes the bits.
    """
    return bool(_kill_suidgid.value)


def is_touch() -> bool:
    """Return whether the current request sets both times to now (ATTR_TOUCH); False without the supplement.

    Valid at the beginning of a handler, before its first await.
    """
    return bool(_touch.value)
