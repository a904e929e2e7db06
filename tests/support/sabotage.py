"""What a supervisor does to itself where a test wants it to die or to suffer at a certain place.

Called in the supervisor's process before it begins, see tests/support/zygote.py.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import trio

from daxemu.fs.filesystem import Filesystem
from daxemu.fs.inode import Inode
from daxemu.fs.namespace import Namespace
from daxemu.host.direct.mappings import DirectMappings
from daxemu.host.fuse.handlers import result_of
from daxemu.host.fuse.operations import Operations
from daxemu.host.fuse.session import Session
from daxemu.host.fuse.watchdog import Watchdog
from daxemu.host.page_cache.invalidate_lock import InvalidateLock
from daxemu.host.page_cache.kernel_pages import KernelPages
from daxemu.host.page_cache.mappings import PageCacheMappings
from daxemu.host.proc.mountinfo import Mount
from daxemu.mm.incident import Incident
from daxemu.mm.to_kill import Task
from daxemu.pmem.dax_device import DaxDevice
from daxemu.pmem.pmem import Pmem
from daxemu.protocol import BadblockList
from daxemu.supervisor import clones
from daxemu.supervisor.verbs import files
from daxemu.uapi import PAGE_SIZE
from tests.support.steps import Steps, count_all


def die_at_access(number: int) -> None:
    """kill -9, just before it takes hold of media bytes for the n-th time."""
    access, left = DaxDevice.direct_access, number

    def counted(self: DaxDevice, offset: int, length: int) -> memoryview:
        nonlocal left
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return access(self, offset, length)

    DaxDevice.direct_access = counted  # type: ignore[method-assign]


def die_at_own_open() -> None:
    """kill -9 while one of its threads waits for it to open a file of its own mount."""
    answer = Operations.open

    async def deadly(self: Operations, inode: Any, flags: Any, ctx: Any) -> Any:
        if ctx.pid in map(int, os.listdir("/proc/self/task")):
            os.kill(os.getpid(), signal.SIGKILL)
        return await answer(self, inode, flags, ctx)

    Operations.open = deadly  # type: ignore[method-assign]


def stop_at_remap(directory: str) -> None:
    """Stand still just before blocks are shared, see _stop()."""
    remap = Filesystem.remap_in_pieces

    def stopped(self: Filesystem, *arguments: int) -> Generator[None, None, int]:
        _stop(Path(directory))
        return remap(self, *arguments)

    Filesystem.remap_in_pieces = stopped  # type: ignore[assignment,method-assign]


def stop_between_pieces(directory: str, pieces: int) -> None:
    """After some steps of a clone, stop the clone as _stop(). The event loop goes on."""

    async def in_two(steps: Generator[None, None, int]) -> int:
        for _ in range(pieces):
            next(steps)
        await trio.to_thread.run_sync(_stop, Path(directory))
        return await result_of(steps)

    vars(clones)["result_of"] = in_two


def stop_in_write_back(directory: str, name: str) -> None:
    """Write the first page of this file back, stand still, then write back the others: a pass over many pages
    takes its time.
    """
    write_back, sync = KernelPages.write_back, ctypes.CDLL(None).sync_file_range

    def in_two(self: KernelPages, ino: int, path: bytes | None) -> bool:
        if path != os.fsencode(f"/{name}"):
            return write_back(self, ino, path)
        # Not closed: that would be a pass over all of them.
        fd = os.open(os.fsencode(self.mount.mountpoint) + path, os.O_RDONLY)
        sync(fd, ctypes.c_int64(0), ctypes.c_int64(PAGE_SIZE), 7)
        _stop(Path(directory))
        sync(fd, ctypes.c_int64(PAGE_SIZE), ctypes.c_int64(0), 7)
        return True

    KernelPages.write_back = in_two  # type: ignore[method-assign]


def stop_in_failure(directory: str, when: str) -> None:
    """Stand still in the midst of a failure: "before" its pages are taken away, or "after" that."""
    kind: Any
    for kind in (PageCacheMappings, DirectMappings):
        kind.revoke = _stopping(kind.revoke, Path(directory), when)


def _stopping(
    revoke: Callable[[Any, Incident], None], directory: Path, when: str
) -> Callable[[Any, Incident], None]:
    def stopped(self: object, incident: Incident) -> None:
        if when == "before":
            _stop(directory)
        revoke(self, incident)
        if when == "after":
            _stop(directory)

    return stopped


def stop_at_each_step(directory: str) -> None:
    """Stand still three times in the first failure, see _stop(): in ``directory``/poison before collect, in
    ``collect`` after it, in ``revoke`` before any signal. ``collect/tasks`` has a line for each process that
    was collected: pid, inode, page of the file.
    """
    collect, revoke = PageCacheMappings.collect, PageCacheMappings.revoke
    steps = Path(directory)

    def collected(self: PageCacheMappings, incidents: Sequence[Incident]) -> list[list[Task]]:
        _stop(steps / "poison")
        found = collect(self, incidents)
        lines = [
            f"{t.pid} {run.mapping} {run.index}\n" for tasks in found for t in tasks for run in t.present
        ]
        if not (steps / "collect" / "stopped").exists():
            (steps / "collect" / "tasks").write_text("".join(lines))
        _stop(steps / "collect")
        return found

    def revoked(self: PageCacheMappings, incident: Incident) -> None:
        revoke(self, incident)
        _stop(steps / "revoke")

    PageCacheMappings.collect = collected  # type: ignore[method-assign]
    PageCacheMappings.revoke = revoked  # type: ignore[method-assign]


def _stop(directory: Path) -> None:
    """Once: say so by the file ``stopped``, and wait for the file ``go``. For a while: the test may have
    failed.
    """
    if (directory / "stopped").exists():
        return
    (directory / "stopped").touch()
    deadline = time.monotonic() + 20
    while not (directory / "go").exists() and time.monotonic() < deadline:
        time.sleep(0.001)


def tell_stacks() -> None:
    """On SIGUSR1, write where each of its threads is to its log; for who finds it hanging."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)


def fail_at_reading(prefix: str) -> None:
    """Raise what no code expects in each lookup of a name that begins so and has a hyphen."""
    lookup = Namespace.lookup

    def cursed(self: Namespace, parent: int, name: bytes) -> Any:
        if name.startswith(prefix.encode()) and b"-" in name:
            raise ZeroDivisionError("sabotage")
        return lookup(self, parent, name)

    Namespace.lookup = cursed  # type: ignore[method-assign]


def stand_still_in_badblocks(patience: float) -> None:
    """Stand still in the request ``badblocks`` until the watchdog, with this patience, has named the step."""
    named: list[Any] = []
    name_step = Watchdog._name_step
    Watchdog.__init__.__defaults__ = (patience,)

    def naming(self: Watchdog, thread: int) -> Any:
        named.append(name_step(self, thread))
        return named[0]

    async def stand_still(pmem: Pmem) -> Any:
        while not named:
            pass
        return BadblockList([], 0)

    Watchdog._name_step = naming  # type: ignore[method-assign]
    files.badblocks = stand_still


def wait_in_clone(directory: str) -> None:
    """Before a clone has its source written back, say so by the file ``stopped``, and wait for the file
    ``go``. The event loop goes on.
    """
    is_clean = PageCacheMappings._is_clean

    async def waiting(self: PageCacheMappings, lock: InvalidateLock, source: Inode, last_change: int) -> bool:
        await trio.to_thread.run_sync(_stop, Path(directory))
        return await is_clean(self, lock, source, last_change)

    PageCacheMappings._is_clean = waiting  # type: ignore[method-assign]


def measure_steps(report: str) -> None:
    """Write the longest step of the event loop so far, and the most work of one step, to this file."""
    steps = Steps(Path(report))
    count_all(steps)
    beat = Watchdog.beat

    async def measured(self: Watchdog) -> None:
        trio.lowlevel.add_instrument(steps)
        await beat(self)

    Watchdog.beat = measured  # type: ignore[method-assign]


def stick_in_badblocks(how: str, mark: str) -> None:
    """In the request ``badblocks``, end only when killed: "C" sleeps in a C call that keeps the GIL, "D"
    waits for a request to its own mount. The file ``mark`` is made just before.
    """

    mountpoints: list[Path] = []
    remember = Session.__init__

    def remembering(self: Session, fd: int, mount: Mount) -> None:
        remember(self, fd, mount)
        mountpoints.append(mount.mountpoint)

    async def stuck(pmem: Pmem) -> Any:
        os.close(os.open(mark, os.O_CREAT))
        if how == "C":
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they would interrupt the call
            ctypes.PyDLL(None).sleep(3600)
        os.listdir(mountpoints[0])
        return BadblockList([], 0)

    Session.__init__ = remembering  # type: ignore[method-assign]
    files.badblocks = stuck
