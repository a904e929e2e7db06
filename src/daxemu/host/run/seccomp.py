"""seccomp(2) user notification: another process answers one system call of a program, the kernel answers the
others.

Purpose: the filter that picks madvise(2) with MADV_HWPOISON or MADV_SOFT_OFFLINE, and typed access to its
listener. Children, threads and execs inherit a filter, and so have the same listener. Counterpart in Linux:
Documentation/userspace-api/seccomp_filter.rst, "Userspace Notification".

Invariants:
- other system calls are allowed by number alone, which the kernel remembers (``seccomp_cache_check_allow``);
- the caller of a received call waits as in memory_failure(): only SIGKILL ends the wait
  (SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, Linux 5.19); a call is never restarted and so never done twice.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
from typing import NamedTuple

from daxemu.errors import Busy, Unsupported
from daxemu.uapi import MADV_HWPOISON, MADV_SOFT_OFFLINE

# asm/unistd.h, uapi/linux/audit.h: (seccomp, madvise, AUDIT_ARCH)
_ABI = {"x86_64": (317, 28, 0xC000003E), "aarch64": (277, 233, 0xC00000B7)}

# uapi/linux/seccomp.h
_SET_MODE_FILTER = 1
_NEW_LISTENER = 1 << 3
_WAIT_KILLABLE_RECV = 1 << 5
_RET_ALLOW = 0x7FFF0000
_RET_USER_NOTIF = 0x7FC00000
_FLAG_CONTINUE = 1
_DATA_NR, _DATA_ARCH, _DATA_ARG2 = 0, 4, 32  # struct seccomp_data; the low half of ``int behavior``
_NOTIF = struct.Struct("=QIIiIQ6Q")
_RESPONSE = struct.Struct("=QqiI")
_ID = struct.Struct("=Q")
_IOC_RECV = 3 << 30 | _NOTIF.size << 16 | ord("!") << 8 | 0
_IOC_SEND = 3 << 30 | _RESPONSE.size << 16 | ord("!") << 8 | 1
_IOC_ID_VALID = 1 << 30 | _ID.size << 16 | ord("!") << 8 | 2

# uapi/linux/filter.h, bpf_common.h
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_INSN = struct.Struct("=HBBI")

_PR_SET_NO_NEW_PRIVS = 38

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


class NotifiedCall(NamedTuple):
    """An madvise(2) that waits for an answer. ``tid`` 0: a thread outside this pid namespace."""

    id: int
    tid: int
    start: int
    length: int
    advice: int


def _filter(madvise: int, arch: int) -> bytes:
    """The BPF program: USER_NOTIF for the two advices, ALLOW for everything else."""
    return b"".join(
        _INSN.pack(*insn)
        for insn in (
            (_LOAD, 0, 0, _DATA_ARCH),
            (_JUMP_EQUAL, 0, 6, arch),
            (_LOAD, 0, 0, _DATA_NR),
            (_JUMP_EQUAL, 0, 4, madvise),
            (_LOAD, 0, 0, _DATA_ARG2),
            (_JUMP_EQUAL, 1, 0, MADV_HWPOISON),
            (_JUMP_EQUAL, 0, 1, MADV_SOFT_OFFLINE),
            (_RETURN, 0, 0, _RET_USER_NOTIF),
            (_RETURN, 0, 0, _RET_ALLOW),
        )
    )


def install() -> int:
    """Put this process, and all its later children, under the filter; returns the listener.

    The filter cannot be removed. Without CAP_SYS_ADMIN the function sets no_new_privs: set-user-ID programs
    gain no privilege then. Raises Busy if the process has a listener already, Unsupported where the kernel or
    the machine lacks user notification.
    """
    try:
        seccomp, madvise, arch = _ABI[platform.machine()]
    except KeyError:
        raise Unsupported(f"daxemu run does not know the system calls of {platform.machine()}") from None
    code = _filter(madvise, arch)
    program = _Program(len(code) // _INSN.size, code)

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
    raw = bytearray(_NOTIF.size)
    try:
        fcntl.ioctl(listener, _IOC_RECV, raw, True)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        return None
    id_, tid, _flags, _nr, _arch, _ip, start, length, advice, *_ = _NOTIF.unpack(raw)
    return NotifiedCall(id_, tid, start, length, advice & 0xFFFFFFFF)


def is_waiting(listener: int, call: NotifiedCall) -> bool:
    """Return True if the thread still waits: data read of /proc/TID before is then the thread's own."""
    try:
        fcntl.ioctl(listener, _IOC_ID_VALID, _ID.pack(call.id))
    except FileNotFoundError:
        return False
    return True


def answer(listener: int, call: NotifiedCall, error: int | None) -> None:
    """Let the call return: 0, or -1 with ``error``; with None the kernel carries the call out."""
    response = bytearray(_RESPONSE.pack(call.id, 0, -(error or 0), _FLAG_CONTINUE if error is None else 0))
    try:
        fcntl.ioctl(listener, _IOC_SEND, response, True)
    except FileNotFoundError:
        return  # killed meanwhile
