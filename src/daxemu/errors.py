"""The exception tree, and the one table from exception to errno and exit status.

Every error raised on purpose is a :class:`DaxemuError`. ``errno``: the errno for a program on the mount, and
of the mirrored kernel function. ``exit_status``: the exit status of the command line. The text is one line:
the fault found, and the way to correct it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from daxemu.ranges import Range


class DaxemuError(Exception):
    """Base class of all errors raised on purpose."""

    errno: int = errno.EIO
    exit_status: int = 1

    def __str__(self) -> str:
        return self.args[0] if self.args else os.strerror(self.errno)


class InvalidArgument(DaxemuError):
    """A size, range, name or option out of range or malformed."""

    errno = errno.EINVAL
    exit_status = 2


class NotADevice(DaxemuError):
    """A path that is no DEVICE directory, or a DEVICE directory with damaged contents."""

    errno = errno.ENODEV
    exit_status = 3


class NotMounted(DaxemuError):
    """A path outside every daxemu mount."""

    errno = errno.ENOTTY
    exit_status = 3


class NotASupervisor(NotMounted):
    """A mount named as daxemu's, with a socket not served by a supervisor."""


class Busy(DaxemuError):
    """A resource in use by another process."""

    errno = errno.EBUSY
    exit_status = 4


class PermissionDenied(DaxemuError):
    """The caller is neither the mount's owner nor root."""

    errno = errno.EPERM
    exit_status = 5


class NoSpace(DaxemuError):
    """The device, the metadata region or the memory behind the media is full."""

    errno = errno.ENOSPC
    exit_status = 6


class MediaError(DaxemuError):
    """An access to poison: pmem's -EIO (and -EHWPOISON for direct access).

    ``ranges``: the poisoned device bytes. ``good``: the bytes before the poison, where a read returns them.
    """

    errno = errno.EIO
    exit_status = 7

    def __init__(self, text: str, ranges: Sequence[Range] = (), good: bytes = b"") -> None:
        super().__init__(text)
        self.ranges = tuple(ranges)
        self.good = good


class PartialOverPoison(MediaError):
    """A write of part of a poisoned page: pmem_recovery_write() refuses, the iomap code returns -EFAULT."""

    errno = errno.EFAULT


class Shutdown(DaxemuError):
    """The filesystem is shut down: metadata is damaged, or the device was removed."""

    errno = errno.EIO
    exit_status = 7


class NoDevice(DaxemuError):
    """An address outside every device, or of a removed device (-ENXIO)."""

    errno = errno.ENXIO
    exit_status = 7


class Unsupported(DaxemuError):
    """-EOPNOTSUPP: no lower layer implements the call."""

    errno = errno.EOPNOTSUPP
    exit_status = 8


class CorruptMetadata(DaxemuError):
    """Damaged records of the filesystem (XFS: EFSCORRUPTED)."""

    errno = errno.EUCLEAN
    exit_status = 9


class FsError(DaxemuError):
    """A POSIX refusal of a filesystem verb, with any errno."""

    def __init__(self, number: int, text: str | None = None) -> None:
        super().__init__(text or os.strerror(number))
        self.errno = number


ERRORS: dict[str, type[DaxemuError]] = {
    kind.__name__: kind
    for kind in (
        InvalidArgument,
        NotADevice,
        NotMounted,
        Busy,
        PermissionDenied,
        NoSpace,
        MediaError,
        PartialOverPoison,
        Shutdown,
        NoDevice,
        Unsupported,
        CorruptMetadata,
    )
}
"""Errors by class name, as sent over the control socket."""
