"""Processes that share memory: kcmp(2) compares the address spaces of two threads."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from contextlib import suppress

import trio

from daxemu.host.direct.errors import AddressSpaceGone
from daxemu.host.proc import stat, status

_NR_KCMP = {"x86_64": 312}.get(platform.machine(), 272)  # asm/unistd.h
_KCMP_VM = 1  # uapi/linux/kcmp.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def process_of(tid: int) -> int:
    """Return the process id of a thread. Raises AddressSpaceGone if the thread has ended."""
    found = status.find(tid)
    if found is None:
        raise AddressSpaceGone(f"thread {tid} has ended")
    return found.tgid


def owner_of(tid: int) -> int:
    """Return the process whose memory a thread uses: its own, or the outermost ancestor with the same memory.

    A child of vfork(2) ends, or executes a program, before its parent: the address space is the parent's.
    """
    tgid = process_of(tid)
    with suppress(OSError):  # the process ends at this moment
        while (parent := stat.read(tgid).parent) > 1 and shares_memory(tgid, parent):
            tgid = parent
    return tgid


def thread_of(tid: int, tgid: int, agent: int) -> int:
    """Return the id, in this pid namespace, of a thread that uses the memory of process ``tgid``.

    ``tid``: its id in its own pid namespace, as an event of a userfaultfd names it. 0: the thread has ended.
    """
    here = status.find(tid)
    if here is not None and here.ns_tid == tid and shares_memory(tid, agent):
        return tid
    for process in (tgid, *(int(name) for name in os.listdir("/proc") if name.isdigit())):
        if process != tgid and not (process != agent and shares_memory(process, agent)):
            continue
        with suppress(OSError):
            for name in os.listdir(f"/proc/{process}/task"):
                found = status.find(int(name))
                if found is not None and found.ns_tid == tid:
                    return int(name)
    return 0


def shares_memory(tid: int, agent: int) -> bool:
    """Return True if a thread has the address space of an agent. A dead thread has none."""
    return bool(agent) and int(_libc.syscall(_NR_KCMP, tid, agent, _KCMP_VM, 0, 0)) == 0


async def kill(tgid: int, agent: int) -> None:
    """Kill the process with the address space of an agent, and wait for the end of its last thread."""
    with suppress(ProcessLookupError):
        pidfd = os.pidfd_open(tgid)
        try:
            if shares_memory(tgid, agent):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
