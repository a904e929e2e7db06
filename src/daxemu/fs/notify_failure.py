"""Holder's side of a failure: the owners of a device range (fs/xfs/xfs_notify_failure.c).

The reverse map has every owner, through every reflink; no page has to store its owners.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from daxemu.errors import CorruptMetadata
from daxemu.events import Emit, FileDamaged
from daxemu.fs.inode import RESERVED_INO
from daxemu.fs.namespace import Namespace
from daxemu.fs.pmd_fault import pmd_ranges
from daxemu.fs.rmap import METADATA_INO, Rmap
from daxemu.mm.memory_failure import MemoryFailures
from daxemu.pmem.dax_device import DaxDevice
from daxemu.ranges import Range
from daxemu.uapi import MF_MEM_PRE_REMOVE, U64_MAX
from daxemu.units import PFN_PHYS, blocks_of


class FilesystemHolder:
    """Filesystem as the holder of its DAX device (``struct dax_holder_operations``)."""

    def __init__(
        self,
        dax: DaxDevice,
        rmap: Rmap,
        names: Namespace,
        mm: MemoryFailures,
        emit: Emit,
        shutdown: Callable[[str], None],
    ) -> None:
        self._dax = dax
        self._rmap = rmap
        self._names = names
        self._mm = mm
        self._emit = emit
        self._shutdown = shutdown

    def notify_failure(self, offset: int, length: int, flags: int) -> None:
        """Report each owner of the device bytes ``[offset, offset + length)`` (``xfs_dax_notify_failure()``).

        ``(0, U64_MAX)`` with MF_MEM_PRE_REMOVE is the removal of the whole device: one call, and a shutdown.
        Raises CorruptMetadata (EFSCORRUPTED) if the range holds the filesystem's own records; the filesystem
        is shut down then. Both shutdowns come after the signals, as in the kernel: until then every access is
        served. Free blocks have no owner and count as handled.
        """
        if flags & MF_MEM_PRE_REMOVE:
            self._mm.mf_dax_kill_procs(METADATA_INO, 0, U64_MAX, self._dax.base_pfn, flags)
            self._mm.after_kill(partial(self._shutdown, "Device is about to be removed!"))
            return
        device = Range(0, self._dax.size)
        failed = Range(offset, offset + length).clip(*device)
        if not failed:
            return
        metadata_failed = False
        for owner in self._rmap.owners(*blocks_of(failed)):
            if owner.ino == METADATA_INO:
                metadata_failed = True
                continue
            if owner.ino == RESERVED_INO:
                continue  # a reserved file: no process maps it, and the file that it copies is not damaged
            pfn = self._dax.base_pfn + owner.dev_block
            pmds = pmd_ranges(self._dax, self._rmap, self._names, owner, failed)
            self._mm.mf_dax_kill_procs(owner.ino, owner.file_block, owner.length, pfn, flags, pmds)
            self._emit(
                FileDamaged(
                    ino=owner.ino,
                    path=self._names.path_of(owner.ino),
                    offset=PFN_PHYS(owner.file_block),
                    length=PFN_PHYS(owner.length),
                )
            )
        if metadata_failed:
            reason = "Corruption of on-disk metadata detected at notify_failure.  Shutting down filesystem."
            self._mm.after_kill(partial(self._shutdown, reason))
            raise CorruptMetadata(
                "the filesystem's own records are damaged: it is shut down; unmount and run daxemu fsck"
            )
