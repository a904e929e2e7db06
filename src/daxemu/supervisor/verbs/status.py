"""The verb ``status``."""

from __future__ import annotations

import os
from typing import Literal

from daxemu import protocol as p
from daxemu.events import Outcome
from daxemu.events.mounts import Mode
from daxemu.fs.filesystem import Filesystem
from daxemu.host.fuse.layouts import LayoutTable
from daxemu.host.proc.mountinfo import Mount, printable
from daxemu.host.tracer.link import TracerLink
from daxemu.mm.memory_failure import MemoryFailures
from daxemu.pmem.pmem import Pmem
from daxemu.supervisor.event_log import EventLog
from daxemu.supervisor.repairs import Repairs
from daxemu.supervisor.scrub import Scrubber


def mode_of(pmem: Pmem) -> Mode:
    """Return what a shared mapping of a file is."""
    return "direct" if pmem.media.is_direct else "page cache"


def status(
    pmem: Pmem,
    mm: MemoryFailures,
    fs: Filesystem,
    mount: Mount,
    repairs: Repairs,
    scrubber: Scrubber,
    tracer: TracerLink,
    log: EventLog,
    layouts: LayoutTable | None,
    *,
    settings: dict[str, str],
    open_files: int,
    supplement: str,
) -> p.StatusReport:
    """Return the state of a machine at this moment. ``supplement``: state of the supplement (C)."""
    state: Literal["mounted", "shut down", "removed"] = "mounted"
    if not pmem.dax.alive:
        state = "removed"
    elif fs.shutdown_reason is not None:
        state = "shut down"
    usage = fs.statfs()
    return p.StatusReport(
        device=printable(mount.device),
        mountpoint=printable(mount.mountpoint),
        pid=os.getpid(),
        state=state,
        reason=fs.shutdown_reason,
        size=pmem.dax.size,
        base_pfn=pmem.dax.base_pfn,
        struct_pages=pmem.pgmap is not None,
        blocks=usage.blocks,
        free_blocks=usage.free,
        inodes=usage.files,
        extents=fs.rmap.link_count,
        open_files=open_files,
        badblocks=pmem.badblocks.count,
        poisoned_sectors=pmem.media.poison.total,
        scrubs=scrubber.scrubs,
        settings=settings,
        repair=repairs.report(),
        counters={outcome.value.lower(): mm.counters[outcome] for outcome in Outcome},
        events=log.emitted,
        supplement=supplement,
        mode=mode_of(pmem),
        layouts="off" if layouts is None else f"{layouts.answered} requests answered",
        tracer=f"pid {tracer.pid}" if tracer.pid is not None else "not running",
    )
