"""Walks over processes of which one may never answer.

A read of /proc/PID/pagemap, and before Linux 6.17 of /proc/PID/maps, takes mmap_lock of the process. The lock
is never free while a thread of the process holds the lock in a page fault that a foreign server does not
answer, and another thread waits to write. The reader sleeps in state D until then. Such a process must not
hold up the walk over all others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from daxemu.host.proc import stat
from daxemu.host.proc.procfs import read_whole

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

PATIENCE = 1.0
"""Seconds without a wake-up in state D after which a process counts as stuck: the first of a walk."""
_NEXT_PATIENCE = 0.2
"""The same for every further process of a walk, so that many stuck processes cost little more than one."""
_LOOK = 0.02  # seconds between looks at the thread that walks


class Walk(Protocol[T_co]):
    """Walk over processes, one after another."""

    def run(self) -> None:
        """Walk."""

    @property
    def done(self) -> int:
        """Return the number of processes that are finished."""

    def found(self, count: int) -> Sequence[T_co]:
        """Return the findings at the first ``count`` processes. Precondition: ``count`` <= ``done``."""


class _Looks(Generic[T]):
    """Walk by a function that looks at one process."""

    def __init__(self, pids: Sequence[int], look: Callable[[int], T]) -> None:
        self._pids = pids
        self._look = look
        self._found: list[T] = []

    def run(self) -> None:
        for pid in self._pids:
            self._found.append(self._look(pid))

    @property
    def done(self) -> int:
        return len(self._found)

    def found(self, count: int) -> list[T]:
        return self._found[:count]


class _Stuck(NamedTuple):
    """Thread that sleeps in the walk at process number ``position``."""

    thread: threading.Thread
    walk: Walk[object]
    position: int

    @property
    def is_over(self) -> bool:
        return not self.thread.is_alive() or self.walk.done != self.position


_stuck: dict[int, _Stuck] = {}
"""By process id. Threads that collect add; a pid of a released process is removed at the next look."""


def stuck() -> set[int]:
    """Return the ids of the processes at which a thread still sleeps: a look at these is of no use."""
    for pid, found in list(_stuck.items()):
        if found.is_over:
            _stuck.pop(pid, None)
    return set(_stuck)


def each(
    shares: Sequence[Sequence[int]], start: Callable[[Sequence[int]], Walk[T]]
) -> tuple[list[T], list[int]]:
    """Walk over the processes of all shares, each share in a thread. Return what was found, and the ids of
    the processes that are stuck.

    ``start`` makes a walk over some of the processes. Exceptions of the walk propagate.
    """
    found: list[T] = []
    left_out: list[int] = []
    walkers = [_Walker(start(pids)) for pids in shares if pids]
    patience = PATIENCE
    for pids, walker in zip(filter(None, shares), walkers, strict=True):
        while walker.is_stuck(patience):
            position, patience = walker.walk.done, _NEXT_PATIENCE
            found += walker.walk.found(position)
            left_out.append(pids[position])
            _stuck[pids[position]] = _Stuck(walker.thread, walker.walk, position)
            pids = pids[position + 1 :]
            walker = _Walker(start(pids))
        found += walker.walk.found(len(pids))
    return found, left_out


def each_by(pids: Sequence[int], look: Callable[[int], T]) -> tuple[list[T], list[int]]:
    """As ``each``, with one share, and a function that looks at one process."""
    return each([pids], lambda part: _Looks(part, look))


class _Walker(Generic[T]):
    """Thread that walks. A daemon: the end of this process must not wait for the thread."""

    def __init__(self, walk: Walk[T]) -> None:
        self.walk = walk
        self._ended = threading.Event()
        self._failed: list[BaseException] = []
        self.thread = threading.Thread(target=self._run, name="daxemu-walk", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.walk.run()
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            self._failed.append(error)
        finally:
            self._ended.set()

    def is_stuck(self, patience: float) -> bool:
        """Return True once the thread has slept for ``patience`` seconds at one process, False at its end.

        Raises the exception of the walk.
        """
        since, before = time.monotonic(), None
        while not self._ended.wait(_LOOK):
            now = self.walk.done, _sleep_of(self.thread.native_id)
            if now[1] is None or now != before:
                since, before = time.monotonic(), now
            elif time.monotonic() - since >= patience and not self._ended.is_set():
                return True
        if self._failed:
            raise self._failed[0]
        return False


def _sleep_of(tid: int | None) -> bytes | None:
    """Return the number of sleeps so far of a thread in state D; None for a thread in another state.

    A thread that is slow, or gets no processor, is in state R.
    """
    try:
        if stat.read(f"self/task/{tid}").state != "D":
            return None
        status = read_whole(f"/proc/self/task/{tid}/status")
    except OSError:
        return None
    return status.partition(b"\nvoluntary_ctxt_switches:")[2]
