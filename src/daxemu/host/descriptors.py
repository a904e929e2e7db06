"""Descriptors in reserve: programs with direct mappings leave some free for failures and for requests."""

from __future__ import annotations

import errno
import resource

from daxemu.errors import Unsupported

LEAST = 128
"""Hard limit of open files below which a mount is refused: a mount has 40, a failure takes some more."""

RESERVE = 256
"""Descriptors not for peers and programs: 40 worker threads with a few files of /proc, and the device."""

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of a call that makes a descriptor: none is free."""


def check_limit() -> None:
    """Check that a mount has descriptors for itself and for a failure. Raises Unsupported."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < LEAST:
        raise Unsupported(
            f"a mount needs {LEAST} open files, and the limit is {hard}: raise the hard limit (ulimit -Hn)"
        )


def is_in_reserve(fd: int) -> bool:
    """Return whether a new descriptor takes one of the last RESERVE, or of the last quarter of a low limit.

    The kernel gives the lowest free number, so a high number means that all lower ones are in use.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft != resource.RLIM_INFINITY and fd >= soft - min(RESERVE, soft // 4)
