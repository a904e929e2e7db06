"""siginfo_t as bytes, and the state of a thread's signals in /proc.

Purpose: read and build the few layouts that the tracer needs. Counterpart in Linux:
uapi/asm-generic/siginfo.h, kernel_siginfo_layout() in kernel/signal.c.

Invariants: every siginfo here is exactly SIGINFO_SIZE bytes. The layout is the one of 64-bit Linux (the union
begins at byte 16), the same on x86_64 and aarch64.
"""

from __future__ import annotations

import os
import platform
import struct
from signal import SIGBUS
from typing import NamedTuple

from daxemu.host.proc.procfs import GONE, read_whole
from daxemu.host.proc.status import ThreadStatus
from daxemu.uapi import BUS_ADRERR

SIGINFO_SIZE = 128

# uapi/asm-generic/siginfo.h: sent by sigqueue(3), with a value of the sender's choice
SI_QUEUE = -1

SIGBUS_BIT = 1 << (SIGBUS - 1)  # in the masks of ThreadStatus

# asm/unistd.h
_NR_RT_SIGTIMEDWAIT = {"x86_64": 128, "aarch64": 137}.get(platform.machine(), -1)

_HEAD = struct.Struct("=iii4x")
_SENDER = struct.Struct("=iIQ")  # si_pid, si_uid, si_value
_FAULT = struct.Struct("=Qh")  # si_addr, si_addr_lsb
_UNION = _HEAD.size


class SigInfo(NamedTuple):
    """Fields by which the tracer decides. ``value`` has a meaning for SI_QUEUE only, ``addr`` for BUS_*."""

    signo: int
    code: int
    value: int
    addr: int
    lsb: int

    @property
    def is_bus_adrerr(self) -> bool:
        """Return True for the siginfo that a page fault forces when the filesystem cannot give the page."""
        return self.signo == SIGBUS and self.code == BUS_ADRERR

    def is_queued_with(self, value: int) -> bool:
        """Return True for the siginfo that :func:`queued` built from ``value``."""
        return self.code == SI_QUEUE and self.value == value


def parse(raw: bytes) -> SigInfo:
    """Decode a siginfo_t."""
    signo, _errno, code = _HEAD.unpack_from(raw)
    _pid, _uid, value = _SENDER.unpack_from(raw, _UNION)
    addr, lsb = _FAULT.unpack_from(raw, _UNION)
    return SigInfo(signo, code, value, addr, lsb)


def bus_error(code: int, addr: int, lsb: int) -> bytes:
    """Build the siginfo of a SIGBUS by a fault: force_sig_mceerr() and send_sig_mceerr() of kernel/signal.c.

    ``addr`` is a virtual address of the receiver, ``lsb`` the binary logarithm of the size of the lost range
    in bytes.
    """
    return (_HEAD.pack(SIGBUS, 0, code) + _FAULT.pack(addr, lsb)).ljust(SIGINFO_SIZE, b"\0")


def queued(signo: int, value: int) -> bytes:
    """Build the siginfo of sigqueue(3) by this process; the tracer recognizes its own signals by the 64-bit
    ``value``.
    """
    sender = _SENDER.pack(os.getpid(), os.getuid(), value)
    return (_HEAD.pack(signo, 0, SI_QUEUE) + sender).ljust(SIGINFO_SIZE, b"\0")


def _current_syscall(tid: int) -> int:
    """Return the system call a thread sleeps in, or -1 (running, in a page fault, or gone)."""
    try:
        word = read_whole(f"/proc/{tid}/syscall").split()[0]
    except GONE:
        return -1
    return int(word) if word.isdigit() else -1


def is_ignored(status: ThreadStatus) -> bool:
    """Return True if the kernel would discard a SIGBUS at once: sig_ignored(). The kernel keeps a blocked
    SIGBUS.
    """
    if status.blocked & SIGBUS_BIT or not status.ignored & SIGBUS_BIT:
        return False
    # SIGBUS may be blocked after all: /proc shows the mask that rt_sigtimedwait(2) has while it sleeps.
    return _current_syscall(status.tid) != _NR_RT_SIGTIMEDWAIT
