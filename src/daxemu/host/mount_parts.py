"""Parts of a mount that an implementation of the seam for mappings is made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from daxemu.events import Emit
from daxemu.fs.filesystem import Filesystem
from daxemu.host.fuse.gates import Gates
from daxemu.host.fuse.open_files import OpenFiles
from daxemu.host.fuse.session import Session
from daxemu.host.mappings import Mappings
from daxemu.host.tracer.link import TracerLink
from daxemu.host.unexpected import Nursery, Unexpected
from daxemu.pmem.pmem import Pmem


@dataclass(frozen=True)
class MountParts:
    """Everything below the seam. ``nursery`` runs tasks that outlive a request."""

    pmem: Pmem
    fs: Filesystem
    session: Session
    open_files: OpenFiles
    gates: Gates
    tracer: TracerLink
    emit: Emit
    nursery: Nursery
    unexpected: Unexpected


MakeMappings = Callable[[MountParts], Mappings]
"""Constructor of an implementation. Called once for each mount, within the event loop."""
