"""seccomp(2) user notification: another process answers some system calls of a program, the kernel answers
the others.

Purpose: installing a filter (``filters``), and typed access to its listener. Children, threads and execs
inherit a filter, and so have the same listener. A copy of the listener in another process (pidfd_getfd(2))
answers as well as the first. Counterpart in Linux: Documentation/userspace-api/seccomp_filter.rst, "Userspace
Notification".

Invariants:
- the caller of a received call waits as in memory_failure(): only SIGKILL ends the wait
  (SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, Linux 5.19); a call is never restarted and so never done twice.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from typing import NamedTuple

from daxemu.errors import Busy, Unsupported
from daxemu.host.run import filters
from daxemu.host.run.bpf import INSTRUCTION

# uapi/linux/seccomp.h
_SET_MODE_FILTER = 1
_NEW_LISTENER = 1 << 3
_WAIT_KILLABLE_RECV = 1 << 5
_FLAG_CONTINUE = 1
_ADDFD_SETFD = 1
NOTIFICATION = struct.Struct("=QIIiIQ6Q")
"""struct seccomp_notif: id, thread id, flags, number, machine, instruction pointer, six arguments."""
_RESPONSE = struct.Struct("=QqiI")
_ADDFD = struct.Struct("=QIIII")
_ID = struct.Struct("=Q")
_IOC_RECV = 3 << 30 | NOTIFICATION.size << 16 | ord("!") << 8 | 0
_IOC_SEND = 3 << 30 | _RESPONSE.size << 16 | ord("!") << 8 | 1
_IOC_ID_VALID = 1 << 30 | _ID.size << 16 | ord("!") << 8 | 2
_IOC_ADDFD = 1 << 30 | _ADDFD.size << 16 | ord("!") << 8 | 3

_PR_SET_NO_NEW_PRIVS = 38

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


class NotifiedCall(NamedTuple):
    """A system call that waits for an answer. ``tid`` 0: a thread outside this pid namespace. ``nr``: number
    of the system call. ``args``: the six registers, 64 bits each, without signs. ``ip``: address behind the
    instruction.
    """

    id: int
    tid: int
    nr: int
    args: tuple[int, int, int, int, int, int]
    ip: int = 0


class Answer(NamedTuple):
    """Result of a call: ``value``, or -1 with ``error``. With ``proceed`` the kernel carries the call out
    with the arguments that its registers and memory hold at that time.
    """

    value: int = 0
    error: int = 0
    proceed: bool = False


CONTINUE = Answer(proceed=True)
RESTART = Answer(error=513)
"""ERESTARTNOINTR of linux/errno.h: the thread makes the call again, if a tracer has interrupted it."""


def install(code: bytes | None = None) -> int:
    """Put this process, and all its later children, under a filter; returns the listener.

    ``code``: the BPF program; None: ``filters.small``. The filter cannot be removed. Without CAP_SYS_ADMIN
    the function sets no_new_privs: set-user-ID programs gain no privilege then. Raises Busy if the process
    has a listener already, Unsupported where the kernel or the machine lacks user notification.
    """
    seccomp = filters.abi().seccomp
    if code is None:
        code = filters.small()
    program = _Program(len(code) // INSTRUCTION.size, code)

    def attempt() -> int:
        flags = _NEW_LISTENER | _WAIT_KILLABLE_RECV
        return int(_libc.syscall(seccomp, _SET_MODE_FILTER, flags, ctypes.byref(program)))

    listener = attempt()
    if listener < 0 and ctypes.get_errno() == errno.EACCES:
        _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        listener = attempt()
    if listener >= 0:
        return listener
    number = ctypes.get_errno()
    if number == errno.EBUSY:
        raise Busy("another program answers system calls here already: daxemu run inside of daxemu run?")
    if number in (errno.EINVAL, errno.ENOSYS):
        raise Unsupported("daxemu run needs Linux 5.19 with CONFIG_SECCOMP_FILTER")
    raise OSError(number, f"seccomp: {os.strerror(number)}")


def receive(listener: int) -> NotifiedCall | None:
    """Return the next call; None if the call was withdrawn meanwhile (a signal came first, or the thread
    died).
    """
    raw = bytearray(NOTIFICATION.size)
    try:
        fcntl.ioctl(listener, _IOC_RECV, raw, True)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        return None
    return parse(raw)


def parse(raw: bytes | bytearray) -> NotifiedCall:
    """Return the call of a struct seccomp_notif. Precondition: ``raw`` has the size of NOTIFICATION."""
    id_, tid, _flags, nr, _arch, ip, a, b, c, d, e, f = NOTIFICATION.unpack(raw)
    return NotifiedCall(id_, tid, nr, (a, b, c, d, e, f), ip)


def arch_of(raw: bytes | bytearray) -> int:
    """Return the machine (AUDIT_ARCH_*) of the call of a struct seccomp_notif."""
    return int(NOTIFICATION.unpack(raw)[4])


def flags_of(raw: bytes | bytearray) -> int:
    """Return the flags of a struct seccomp_notif. The kernel leaves them 0; forward.c uses them."""
    return int(NOTIFICATION.unpack(raw)[2])


def is_waiting(listener: int, call: NotifiedCall) -> bool:
    """Return True if the thread still waits: data read of /proc/TID before is then the thread's own."""
    try:
        fcntl.ioctl(listener, _IOC_ID_VALID, _ID.pack(call.id))
    except FileNotFoundError:
        return False
    return True


def add_fd(listener: int, call: NotifiedCall, fd: int, *, number: int | None = None) -> int:
    """Copy descriptor ``fd`` of this process into the process that waits, with FD_CLOEXEC; return its number
    there.

    ``number``: the wanted number, which is closed first if in use; None: the lowest free one. The thread goes
    on waiting. Raises FileNotFoundError if the thread is dead, OSError with EMFILE if the process may have no
    more descriptors, EINPROGRESS if the call was answered.
    """
    flags = 0 if number is None else _ADDFD_SETFD
    raw = bytearray(_ADDFD.pack(call.id, flags, fd, number or 0, os.O_CLOEXEC))
    return int(fcntl.ioctl(listener, _IOC_ADDFD, raw, True))


def answer(listener: int, call: NotifiedCall, answer: Answer) -> bool:
    """Let the call return. Return False if no thread waits for the answer: killed, or answered before.

    A number that is not the id of a waiting call does no harm.
    """
    flags = _FLAG_CONTINUE if answer.proceed else 0
    response = bytearray(_RESPONSE.pack(call.id, answer.value, -answer.error, flags))
    try:
        fcntl.ioctl(listener, _IOC_SEND, response, True)
    except (FileNotFoundError, BlockingIOError):
        return False
    except OSError as error:
        if error.errno != errno.EINPROGRESS:
            raise
        return False
    return True
