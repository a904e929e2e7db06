"""Limits of the kernel for an address space: VMAs, addresses, locked memory.

An agent has no limits of its own (``ProcessAgent``), because a replacement needs addresses twice for a
moment. So the supervisor checks the limits of the program, as the kernel does.
"""

from __future__ import annotations

import errno
import resource

from daxemu.host.proc import status
from daxemu.host.proc.procfs import GONE, read_whole
from daxemu.uapi import PAGE_SIZE

CAP_IPC_LOCK = 14  # uapi/linux/capability.h
NO_LIMITS = (resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_MEMLOCK)
_MAX_MAP_COUNT = "/proc/sys/vm/max_map_count"


def most_pieces() -> int:
    """Return the largest number of shown pieces of an address space.

    A piece counts for two VMAs. A quarter of vm.max_map_count is left to the program.
    """
    with open(_MAX_MAP_COUNT, encoding="ascii") as file:
        return int(file.read()) * 3 // 8


def lift(pid: int) -> None:
    """Give a process, an agent, no limits of memory. Raises OSError."""
    for limit in NO_LIMITS:
        resource.prlimit(pid, limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def refusal(tid: int, size: int, replaced: int, *, is_locked: bool, asks_for_lock: bool) -> int:
    """Return the errno of an mmap(2) of ``size`` bytes that the limits of a thread forbid; 0 if none.

    ``replaced``: bytes of the mappings that go. ``is_locked``: MAP_LOCKED or MCL_FUTURE; ``asks_for_lock``:
    MAP_LOCKED. Counterpart in Linux: may_expand_vm(), can_do_mlock(), mlock_future_ok().
    """
    try:
        locked_limit = resource.prlimit(tid, resource.RLIMIT_MEMLOCK)[0] if is_locked else -1
        if locked_limit >= 0:
            found = status.read(tid)
            if not found.has_capability(CAP_IPC_LOCK):
                if asks_for_lock and not locked_limit:
                    return errno.EPERM
                if _field(tid, b"VmLck:") * 1024 + size > locked_limit:
                    return errno.EAGAIN
        limit = resource.prlimit(tid, resource.RLIMIT_AS)[0]
        if limit >= 0:
            total = int(read_whole(f"/proc/{tid}/statm").split()[0]) * PAGE_SIZE
            if total - replaced + size > limit:
                return errno.ENOMEM
    except GONE:
        pass  # the call has no thread to return to
    return 0


def locks_future(pid: int, address: int) -> bool:
    """Return True if a process locks its later mappings (MCL_FUTURE): ``address`` of the agent is locked."""
    try:
        if not _field(pid, b"VmLck:"):
            return False
        is_it = False
        for line in read_whole(f"/proc/{pid}/smaps").split(b"\n"):
            words = line.split()
            if words and b"-" in words[0] and not words[0].endswith(b":"):
                start, _, end = words[0].partition(b"-")
                is_it = int(start, 16) <= address < int(end, 16)
            elif is_it and words[:1] == [b"VmFlags:"]:
                return b"lo" in words
    except GONE:
        pass
    return False


def _field(pid: int, name: bytes) -> int:
    """Return a number of /proc/PID/status; 0 if missing."""
    for line in read_whole(f"/proc/{pid}/status").split(b"\n"):
        if line.startswith(name):
            return int(line.split()[1])
    return 0
