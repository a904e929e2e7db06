"""Layouts held by C: host/fuse/layouts.c keeps the grants, host/fuse/answers.c answers requests from them.

answers.c runs inside pyfuse3's read of /dev/fuse, so in the event loop's thread. A process has one session,
and so one layout table.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Protocol

from daxemu.fs.inode import Inode
from daxemu.fs.layouts import Layout
from daxemu.host.fuse.structs import ATTR_OUT, RawNote
from daxemu.host.fuse.supplement import quick_library
from daxemu.pmem.media import Memory
from daxemu.uapi import PAGE_SIZE, XATTR_NAME_CAPS, Ino

log = logging.getLogger(__name__)


_ON_NOTED = ctypes.PYFUNCTYPE(None, ctypes.POINTER(RawNote), ctypes.c_size_t)
_WRITTEN, _GROWN, _RELEASED, _FORGOTTEN = 1, 2, 3, 4
_SECOND, _U32, _U64 = 10**9, (1 << 32) - 1, (1 << 64) - 1
FOREVER = 1_000_000
"""Validity of names and attributes, in seconds. The supervisor is the only writer of the filesystem, and
invalidates each change that the kernel does not know of.
"""


class Deeds(Protocol):
    """Receiver of notes about requests answered in C."""

    def wrote(self, ino: Ino, time_ns: int) -> None:
        """Take note of writes to a file, the last at ``time_ns``: nanoseconds since the epoch."""

    def grew(self, ino: Ino, size: int) -> None:
        """Take note of a write that made a file ``size`` bytes long."""

    def released(self, fh: int) -> None:
        """Take note of a closed file handle."""

    def forgot(self, ino: Ino, count: int) -> None:
        """Take note of ``count`` lookups of an inode that the kernel forgot."""


class LayoutTable:
    """Layouts held by C (``fs.layouts.LayoutOps``)."""

    def __init__(self, memory: Memory, deeds: Deeds) -> None:
        """Pass the device's ``memory`` to C. The caller breaks all layouts before unmapping ``memory``."""
        calls = quick_library()
        self._grant = calls.daxemu_layout_grant
        self._grant.argtypes = (*(ctypes.c_uint64,) * 5, ctypes.c_int)
        self._grant.restype = None
        self._break = calls.daxemu_layout_break
        self._break.argtypes, self._break.restype = (ctypes.c_uint64,), None
        self._break_all = calls.daxemu_layout_break_all
        self._attributes = calls.daxemu_layout_attributes
        self._attributes.argtypes = (ctypes.c_uint64, ctypes.c_char_p, ctypes.c_int)
        self._attributes.restype = None
        self._break_attributes = calls.daxemu_layout_break_attributes
        self._break_attributes.argtypes, self._break_attributes.restype = (ctypes.c_uint64,), None
        self._answered = ctypes.c_uint64.in_dll(calls, "daxemu_answered")
        self._deeds = deeds
        self._keep = _ON_NOTED(self._on_noted)
        slot = ctypes.c_void_p.in_dll(calls, "daxemu_noted")
        slot.value = ctypes.cast(self._keep, ctypes.c_void_p).value
        place = calls.daxemu_layouts_device
        place.argtypes, place.restype = (ctypes.c_int, ctypes.c_int64, ctypes.c_void_p), None
        place(*memory)

    @property
    def answered(self) -> int:
        """Number of requests answered without Python."""
        return self._answered.value

    def _on_noted(self, notes: ctypes.Array[RawNote], count: int) -> None:
        for index in range(count):
            note = notes[index]
            try:
                if note.what == _WRITTEN:
                    self._deeds.wrote(note.which, note.value)
                elif note.what == _GROWN:
                    self._deeds.grew(note.which, note.value)
                elif note.what == _RELEASED:
                    self._deeds.released(note.which)
                else:
                    self._deeds.forgot(note.which, note.value)
            except Exception:
                # The caller is C: no Python frame above would see the exception, and the other notes must be
                # taken.
                log.exception("note %d of %d was not taken", note.what, note.which)

    # -- LayoutOps

    def grant(self, layout: Layout) -> None:
        """See LayoutOps."""
        ino, size, start, end, device, may_write = layout
        self._grant(ino, size, start, end, device, may_write)

    def grant_attributes(self, inode: Inode) -> None:
        """See LayoutOps."""
        self._attributes(inode.ino, _attr_out(inode), XATTR_NAME_CAPS not in inode.xattrs)

    def break_attributes(self, ino: Ino) -> None:
        """See LayoutOps."""
        self._break_attributes(ino)

    def break_layout(self, ino: Ino) -> None:
        """See LayoutOps."""
        self._break(ino)

    def break_all(self) -> None:
        """See LayoutOps."""
        self._break_all()


def _attr_out(inode: Inode) -> bytes:
    """Return ``struct fuse_attr_out`` with the bytes that Operations and libfuse answer."""
    atime, atimensec = divmod(inode.atime, _SECOND)
    mtime, mtimensec = divmod(inode.mtime, _SECOND)
    ctime, ctimensec = divmod(inode.ctime, _SECOND)
    times = (atime & _U64, mtime & _U64, ctime & _U64, atimensec, mtimensec, ctimensec)
    owner = (inode.mode, inode.nlink, inode.uid, inode.gid, inode.rdev & _U32)
    return ATTR_OUT.pack(FOREVER, 0, 0, inode.ino, inode.size, inode.sectors, *times, *owner, PAGE_SIZE, 0)
