"""Descriptors in a program: the socket of its agent, in a program without a free descriptor, too.

An mmap(2) or fork(2) takes no descriptor of the program, so neither may fail for the lack of one. The limit
(RLIMIT_NOFILE) is raised for the moment in which the thread is held; the tracer puts the limit back before
the thread runs on. An agent keeps the raised limit.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable

from daxemu.host.run.seccomp import NotifiedCall

_OF_AGENT = 8
"""Descriptors that an agent needs."""


Limit = tuple[int, int]
"""Soft and hard RLIMIT_NOFILE."""


def add_socket(
    add_fd: Callable[[NotifiedCall, int], int], call: NotifiedCall, tgid: int, fd: int
) -> tuple[int, Limit | None]:
    """Copy the socket ``fd`` of an agent into the process that waits. Return its number there, and the limit
    to put back, if the limit was raised.

    Raises OSError; then the limit is as before.
    """
    limit = _raise(tgid) if _is_low(tgid) else None
    try:
        try:
            return add_fd(call, fd), limit
        except OSError as error:
            if error.errno != errno.EMFILE or limit is not None or (limit := _raise(tgid)) is None:
                raise
            return add_fd(call, fd), limit
    except OSError:
        if limit is not None:
            put_back(tgid, limit)
        raise


def put_back(tgid: int, limit: Limit) -> None:
    """Put a limit back. Raises OSError."""
    resource.prlimit(tgid, resource.RLIMIT_NOFILE, limit)


def _is_low(tgid: int) -> bool:
    """Return whether the limit is too low for an agent. False where the limit may not be read."""
    try:
        return 0 <= resource.prlimit(tgid, resource.RLIMIT_NOFILE)[0] < _OF_AGENT
    except OSError:
        return False


def _raise(tgid: int) -> Limit | None:
    """Raise the limit beyond every descriptor in use. Return the former limit; None if the limit stays.

    The limit of another user's process, and a hard limit, need CAP_SYS_RESOURCE.
    """
    try:
        soft, hard = resource.prlimit(tgid, resource.RLIMIT_NOFILE)
        enough = len(os.listdir(f"/proc/{tgid}/fd")) + _OF_AGENT
        new_hard = hard if hard < 0 else max(hard, enough)
        resource.prlimit(tgid, resource.RLIMIT_NOFILE, (enough, new_hard))
    except OSError:
        return None
    return soft, hard
