"""The core of a machine: memory failures and the filesystem, on a device."""

from __future__ import annotations

from daxemu.fs.filesystem import Filesystem
from daxemu.mm.memory_failure import MemoryFailures
from daxemu.pmem.pmem import Pmem
from daxemu.supervisor.event_log import EventLog


def open_core(pmem: Pmem, log: EventLog, owner: tuple[int, int]) -> tuple[MemoryFailures, Filesystem]:
    """Attach ``pmem``, and return memory failures and the filesystem on the device.

    ``owner``: (uid, gid). Raises CorruptMetadata, Busy, NoSpace.
    """
    pmem.make_struct_pages()
    mm = MemoryFailures(log.emit, is_hosted=True, on_count=pmem.show_in_sysfs().show_counters)
    pmem.attach(mm)
    return mm, Filesystem(pmem.dax, mm, log.emit, owner=owner)
