"""The loop of the helper of ``daxemu run`` in C: host/run/forward.c.

Unlike the other C parts this one has no twin in Python: without the C library no program has direct mappings.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
from enum import IntEnum
from functools import cache
from pathlib import Path

from daxemu.errors import Unsupported
from daxemu.host.run import seccomp

_VERSION = 1


class Work(IntEnum):
    """Reasons for a return of :meth:`Forwarder.serve`."""

    DONE = 0
    ENDED = 1
    MADVISE = 2
    DEVICE = 3
    WOKEN = 4


@cache
def library() -> ctypes.CDLL:
    """Return the loaded library. Raises Unsupported if it was not built, or built from other sources."""
    paths = (Path(__file__).with_name(f"_forward{end}") for end in importlib.machinery.EXTENSION_SUFFIXES)
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise Unsupported("host/run/forward.c was not built: install gcc, then daxemu again")
    try:
        loaded = ctypes.CDLL(str(path), use_errno=True)
        version = ctypes.c_int.in_dll(loaded, "daxemu_run_version").value
    except (OSError, ValueError) as error:
        raise Unsupported(f"{path.name} cannot be loaded: {error}") from None
    if version != _VERSION:
        raise Unsupported(f"{path.name} is of version {version}, not {_VERSION}: install daxemu again")
    loaded.daxemu_helper.restype = ctypes.c_void_p
    return loaded


class Forwarder:
    """Receives the calls of a listener: answers, forwards, or returns them. Belongs to one thread."""

    def __init__(self, listener: int) -> None:
        """Open what the loop needs besides the listener. Raises Unsupported, OSError."""
        self._library = library()
        self._mountinfo = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self._wake = os.eventfd(0)
        made = self._library.daxemu_helper(listener, self._mountinfo, self._wake)
        if made is None:
            number = ctypes.get_errno()
            raise OSError(number, f"daxemu_helper: {os.strerror(number)}")
        self._helper = ctypes.c_void_p(made)
        self._call = (ctypes.c_char * seccomp.NOTIFICATION.size)()

    def serve(self) -> tuple[Work, bytes]:
        """Serve until a call needs Python, ``wake`` was called, or the last process under the filter ended.
        Return the reason, and the call as a struct seccomp_notif.
        """
        work = Work(self._library.daxemu_serve(self._helper, self._call))
        if work is Work.WOKEN:
            os.eventfd_read(self._wake)
        return work, bytes(self._call)

    def wake(self) -> None:
        """Make ``serve`` return WOKEN. Safe in any thread."""
        os.eventfd_write(self._wake, 1)

    def route(self, raw: bytes) -> Work:
        """Answer or forward a call once more, after ``attach`` or ``not_ours``. Return DONE, MADVISE or
        DEVICE.
        """
        return Work(self._library.daxemu_route(self._helper, raw))

    @property
    def asked(self) -> int:
        """Minor number of the device that the last DEVICE is about; the major number is 0."""
        return int(self._library.daxemu_asked(self._helper))

    def attach(self, minor: int, zone: range, sock: int) -> None:
        """Forward the calls of a mount to a socket, which the loop closes when its peer is gone. Raises
        Unsupported for more than ``zone.SLICES`` mounts.
        """
        start, end = ctypes.c_uint64(zone.start), ctypes.c_uint64(zone.stop)
        if self._library.daxemu_attach(self._helper, minor, start, end, sock) < 0:
            raise Unsupported("too many direct mounts")

    def not_ours(self, minor: int) -> None:
        """Let the kernel map the files of a device, until the mount table changes."""
        self._library.daxemu_not_ours(self._helper, minor)
