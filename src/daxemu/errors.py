"""The exception tree, and the one table that ties exception, errno and exit status together.

Every error that daxemu raises on purpose is a :class:`DaxemuError`. Its ``errno`` is what a program on the
mount, or the kernel function that is mirrored, would see; its ``exit_status`` is what the command line ends
with; its text is one line that says what was wrong and what to do.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from daxemu.ranges import Range


class DaxemuError(Exception):
    """Base of the tree."""

    errno: int = errno.EIO
    exit_status: int = 1

    def __str__(self) -> str:
        return self.args[0] if self.args else os.strerror(self.errno)


class InvalidArgument(DaxemuError):
    """A size, range, name or option that makes no sense."""

    errno = errno.EINVAL
    exit_status = 2


class NotADevice(DaxemuError):
    """A DEVICE directory that is none, or whose contents cannot be trusted."""

    errno = errno.ENODEV
    exit_status = 3


class NotMounted(DaxemuError):
    """A path that leads to no daxemu mount."""

    errno = errno.ENOTTY
    exit_status = 3


class NotASupervisor(NotMounted):
    """A mount that says it is daxemu's, and whose socket answers as no supervisor would."""


class Busy(DaxemuError):
    """In use by somebody else."""

    errno = errno.EBUSY
    exit_status = 4


class PermissionDenied(DaxemuError):
    """Not the mount's owner, nor root."""

    errno = errno.EPERM
    exit_status = 5


class NoSpace(DaxemuError):
    """The device, its metadata region or the memory behind it is full."""

    errno = errno.ENOSPC
    exit_status = 6


class MediaError(DaxemuError):
    """An access met poison: pmem's -EIO (and -EHWPOISON for direct access). ``ranges``: which device
    bytes. ``good``: the bytes before them, of a read that has them.
    """

    errno = errno.EIO
    exit_status = 7

    def __init__(self, text: str, ranges: Sequence[Range] = (), good: bytes = b"") -> None:
        super().__init__(text)
        self.ranges = tuple(ranges)
        self.good = good


class PartialOverPoison(MediaError):
    """A write of part of a poisoned page: pmem_recovery_write() refuses, and the iomap code says -EFAULT."""

    errno = errno.EFAULT


class Shutdown(DaxemuError):
    """The filesystem was shut down (metadata hurt, or the device is gone)."""

    errno = errno.EIO
    exit_status = 7


class NoDevice(DaxemuError):
    """No such address: outside every device, or of a device that is gone (-ENXIO)."""

    errno = errno.ENXIO
    exit_status = 7


class Unsupported(DaxemuError):
    """-EOPNOTSUPP: nobody below answers this call."""

    errno = errno.EOPNOTSUPP
    exit_status = 8


class CorruptMetadata(DaxemuError):
    """The filesystem's own records are damaged (XFS: EFSCORRUPTED)."""

    errno = errno.EUCLEAN
    exit_status = 9


class FsError(DaxemuError):
    """A POSIX refusal of a filesystem verb; carries any errno."""

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
"""By class name, as they travel over the control socket."""
