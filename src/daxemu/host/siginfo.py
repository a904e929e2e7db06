"""siginfo_t, as bytes: what a signal handler, sigwaitinfo(2) and PTRACE_GETSIGINFO see.

Purpose: read and build the few layouts that the tracer needs. Counterpart in Linux: uapi/asm-generic/siginfo.h,
kernel_siginfo_layout() in kernel/signal.c.

Invariants: every siginfo handled here is exactly SIGINFO_SIZE bytes; the layout is that of 64-bit Linux (the union begins
at byte 16), the same on x86_64 and aarch64.
"""

from __future__ import annotations

import os
import struct
from signal import SIGBUS
from typing import NamedTuple

from daxemu.uapi import BUS_ADRERR, BUS_MCEERR_AO, BUS_MCEERR_AR

SIGINFO_SIZE = 128

# uapi/asm-generic/siginfo.h: sent by sigqueue(3), with a value of the sender's choice
SI_QUEUE = -1

_HEAD = struct.Struct("=iii4x")
_SENDER = struct.Struct("=iIQ")  # si_pid, si_uid, si_value
_FAULT = struct.Struct("=Qh")  # si_addr, si_addr_lsb
_UNION = _HEAD.size


class SigInfo(NamedTuple):
    """The fields the tracer decides by. ``value`` only means something if ``code`` is SI_QUEUE, ``addr`` if it is BUS_*."""

    signo: int
    code: int
    value: int
    addr: int
    lsb: int

    @property
    def is_poison(self) -> bool:
        """Whether it is one of memory_failure()'s two signals."""
        return self.signo == SIGBUS and self.code in (BUS_MCEERR_AO, BUS_MCEERR_AR)

    @property
    def is_bus_adrerr(self) -> bool:
        """Whether it is what a page fault forces when the filesystem cannot give the page."""
        return self.signo == SIGBUS and self.code == BUS_ADRERR


def parse(raw: bytes) -> SigInfo:
    """Decode a siginfo_t."""
    signo, _errno, code = _HEAD.unpack_from(raw)
    _pid, _uid, value = _SENDER.unpack_from(raw, _UNION)
    addr, lsb = _FAULT.unpack_from(raw, _UNION)
    return SigInfo(signo, code, value, addr, lsb)


def bus_error(code: int, addr: int, lsb: int) -> bytes:
    """The siginfo of a SIGBUS by a fault: force_sig_mceerr() and send_sig_mceerr() of kernel/signal.c.

    ``addr`` is a virtual address of the receiver, ``lsb`` the binary logarithm of the size of what was lost, in bytes.
    """
    return (_HEAD.pack(SIGBUS, 0, code) + _FAULT.pack(addr, lsb)).ljust(SIGINFO_SIZE, b"\0")


def queued(signo: int, value: int) -> bytes:
    """The siginfo of sigqueue(3) by this process, carrying ``value`` (64 bits): how the tracer knows its own signals."""
    return (_HEAD.pack(signo, 0, SI_QUEUE) + _SENDER.pack(os.getpid(), os.getuid(), value)).ljust(SIGINFO_SIZE, b"\0")
