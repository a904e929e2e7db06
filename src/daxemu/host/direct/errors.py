"""Errors of an address space, each with its own name: DaxemuError with the errno of the kernel.

CallRefused is the answer to a program.
"""

from __future__ import annotations

import errno

from daxemu.errors import DaxemuError


class AddressSpaceGone(DaxemuError):
    """The process ended or called execve(2): its address space has no agent any more (ESRCH)."""

    errno = errno.ESRCH


class AddressSpaceChanging(DaxemuError):
    """A fork, mremap or munmap of the address space waits until its event is read from the userfaultfd
    (EAGAIN). The caller tries again after the next :meth:`~daxemu.host.direct.userfaultfd.Userfaultfd.read`.

    ``done``: bytes from the start of the range that were changed before.
    """

    errno = errno.EAGAIN

    def __init__(self, text: str, done: int = 0) -> None:
        super().__init__(text)
        self.done = done


class PagePresent(DaxemuError):
    """A page of the range is mapped already, or has a marker of write protection (EEXIST).

    ``done``: bytes from the start of the range that were changed before.
    """

    errno = errno.EEXIST

    def __init__(self, text: str, done: int = 0) -> None:
        super().__init__(text)
        self.done = done


class NotRegistered(DaxemuError):
    """The range is not mapped, not registered for the request, or not made of whole pages (EINVAL,
    ENOENT).
    """

    errno = errno.EINVAL


class RegisteredElsewhere(DaxemuError):
    """A userfaultfd of the program itself has the range (EBUSY)."""

    errno = errno.EBUSY


class NotWritable(DaxemuError):
    """The range maps a file shared that was not opened for writing (EPERM)."""

    errno = errno.EPERM


class AgentRefused(DaxemuError):
    """No agent can be made in the process; the text says why (EAGAIN)."""

    errno = errno.EAGAIN


class CallRefused(Exception):
    """A call ends with an errno."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.errno = number
