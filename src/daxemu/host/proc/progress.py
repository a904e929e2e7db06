"""Progress of threads since a moment: a delivered signal is not handled before its thread runs.

Counterpart in Linux: none. memory_failure() goes on as soon as a signal is queued, and has long work before
the holder's shutdown. Here the shutdown follows within microseconds, and the victim may still wait for a
processor.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from daxemu.host.proc import stat
from daxemu.host.proc.procfs import read_whole

_INTERVAL = 0.001  # seconds; a running thread's time is brought up to date once a tick
_LEAST_RUN = 500_000
"""Nanoseconds on a processor after which a thread has entered its signal handler.

A thread that leaves its ptrace stop runs in the kernel first. A cgroup with a limit of processor time
(cpu.max) throttles the thread there, before the first instruction of the handler: since Linux 6.18 always.
"""


def wait_until_run(tids: Iterable[int], patience: float) -> list[int]:
    """Wait until each thread has run or is asleep, at most ``patience`` seconds. Return the other threads.

    Precondition: the signals were delivered before. Blocks: from a worker thread only.
    """
    waiting = {tid: since for tid in tids if (since := runtime(tid)) is not None}
    deadline = time.monotonic() + patience
    while waiting and time.monotonic() < deadline:
        time.sleep(_INTERVAL)
        waiting = {tid: since for tid, since in waiting.items() if starves(tid, since)}
    return list(waiting)


def starves(tid: int, since: int | None) -> bool:
    """Return True if a thread wants to run, but has had no processor since its ``runtime`` was ``since``."""
    now = runtime(tid)
    return now is not None and since is not None and now - since < _LEAST_RUN


def runtime(tid: int) -> int | None:
    """Return the nanoseconds on a processor of a thread that is runnable (R) or in a ptrace stop (t).

    None for any other thread, and for a kernel without CONFIG_SCHED_INFO.
    """
    try:
        if stat.read(tid).state not in "Rt":
            return None
        return int(read_whole(f"/proc/{tid}/schedstat").split()[0])
    except (OSError, IndexError):
        return None
