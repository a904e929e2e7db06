"""The verb ``remove``: surprise removal of the device while in use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from daxemu import protocol as p
from daxemu.events import DaxActiveAtRemove, DeviceRemoved, Emit
from daxemu.fs.filesystem import Filesystem
from daxemu.host.fuse.freeze import Freeze
from daxemu.host.fuse.gates import Gates
from daxemu.mm.memory_failure import MemoryFailures
from daxemu.pmem.pmem import Pmem
from daxemu.supervisor.failures import Failures
from daxemu.supervisor.scrub import Scrubber
from daxemu.supervisor.verbs.device_ranges import check_present


async def remove(
    pmem: Pmem,
    mm: MemoryFailures,
    fs: Filesystem,
    failures: Failures,
    gates: Gates,
    scrubber: Scrubber,
    emit: Emit,
    request: p.Remove,
) -> p.Removed:
    """Remove the device: one failure of the whole range, a signal to every process with a page present.

    The order is that of xfs_dax_notify_dev_failure(): freeze, kill, shut down, thaw. No access fails before
    every AO is delivered or SIGNAL_PATIENCE has passed. Raises NoDevice if the device was removed before.
    """
    check_present(pmem)
    was_idle = pmem.dax.dax_is_idle()
    if not was_idle:
        emit(DaxActiveAtRemove(device=pmem.name))
    scrubber.stop()
    with frozen(fs, gates) as freeze:
        incident = mm.removal(pmem.pages.start, pmem.pages.length, pmem.dax.pre_remove)
        signals, processes = (await failures.handle(incident, collected=freeze.admit)).signalled
    pmem.dax.kill_dax()
    pmem.detach(mm)
    device = pmem.name
    emit(DeviceRemoved(device=device, told=signals, signals=signals, processes=processes))
    return p.Removed(signals, was_idle, signals, processes)


@contextmanager
def frozen(fs: Filesystem, gates: Gates) -> Iterator[Freeze]:
    """Hold reads and writes back until the filesystem is shut down, at most until the end of the context."""
    freeze = gates.freeze = Freeze()
    with fs.layouts.suspended():  # C would answer reads and writes
        try:
            yield freeze
        finally:
            freeze.thaw()
