"""Facts of one process or thread: its process, name, threads, capabilities."""

from __future__ import annotations

import os
from collections.abc import Iterator

from daxemu.host.proc import stat, status
from daxemu.host.proc.procfs import GONE, read_whole
from daxemu.mm.memory_failure import Thread
from daxemu.text import name_text
from daxemu.uapi import CAP_FSETID


def process_of(tid: int) -> int:
    """Return the process id of a thread; the thread's own id if the thread is gone."""
    try:
        return status.read(tid).tgid
    except GONE:
        return tid


def read_threads(pid: int) -> Iterator[Thread]:
    """Yield the threads of a process, in the kernel's order, with their task flags."""
    for name in os.listdir(f"/proc/{pid}/task"):
        try:
            yield Thread(int(name), stat.read(f"{pid}/task/{name}").flags)
        except GONE:
            continue


def read_process(pid: int) -> tuple[str, list[Thread]]:
    """Return the name and the threads of a process. Raises OSError.

    A single thread is the leader: then one file of /proc has all that is asked for.
    """
    raw = read_whole(f"/proc/{pid}/stat")
    leader = stat.parse(raw)
    comm = as_comm(raw.partition(b"(")[2].rpartition(b") ")[0])
    return comm, [Thread(pid, leader.flags)] if leader.nr_threads == 1 else list(read_threads(pid))


def read_comm(pid: int | str) -> str:
    """Return the name of a process as daxemu.text.name_text encodes names. Raises OSError."""
    return as_comm(read_whole(f"/proc/{pid}/comm"))


def comm_of(pid: int) -> str:
    """Return the name of a process for an event; "?" if the process is gone or may not be read."""
    try:
        return read_comm(pid)
    except OSError:
        return "?"


def as_comm(comm: bytes) -> str:
    """Return a name in the kernel's bytes, with or without the newline at its end, as :func:`read_comm`."""
    return name_text(comm.removesuffix(b"\n"))


def in_page_fault(tid: int) -> bool | None:
    """Return whether a thread is, or may be, in its own page fault: neither in a system call nor gone.

    None if /proc/TID/syscall cannot be read.
    """
    try:
        with open(f"/proc/{tid}/syscall", "rb") as file:
            # Also "running": the thread has sent its request, and is not asleep yet.
            return not file.read(1).isdigit()
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return None


def tracer_of(tid: int) -> int:
    """Return the id of the process that traces a thread; 0 for none, and for a thread that is gone."""
    found = status.find(tid)
    return process_of(found.tracer) if found is not None and found.tracer else 0


def faults_of(tid: int) -> int:
    """Return the number of page faults that a thread has completed; 0 for a thread that is gone."""
    try:
        return sum(map(int, stat.read(f"{tid}/task/{tid}").faults))
    except OSError:
        return 0


def place_of_fault(tid: int) -> tuple[int, int, int] | None:
    """Return stack pointer, instruction pointer and faults_of() of a thread that sleeps in its own page
    fault. No two page faults of a thread have equal ones. None of any other thread, and where
    /proc/TID/syscall cannot be read.
    """
    faults = faults_of(tid)  # before: a page fault completed in between makes the place one of no page fault
    try:
        words = read_whole(f"/proc/{tid}/syscall").split()
    except OSError:
        return None
    is_asleep = len(words) == 3 and words[0] == b"-1"
    return (int(words[1], 16), int(words[2], 16), faults) if is_asleep else None


def capable(tid: int | str, capability: int) -> bool:
    """Return whether a thread has a capability (CAP_*); False for a thread that is gone.

    Raises PermissionError where /proc hides the thread.
    """
    try:
        return status.read(tid).has_capability(capability)
    except (FileNotFoundError, ProcessLookupError):
        return False


def in_group_or_capable(tid: int, gid: int) -> bool:
    """Return whether a thread may leave S_ISGID set (fs/inode.c), by membership in ``gid`` or CAP_FSETID.

    False for a thread that is gone. Raises PermissionError where /proc hides the thread.
    """
    try:
        found = status.read(tid)
        return gid in found.groups or found.has_capability(CAP_FSETID)
    except (FileNotFoundError, ProcessLookupError):
        return False
