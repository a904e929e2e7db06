"""Holder's side of a failure: the owners of a device range (fs/xfs/xfs_notify_failure.c).

The reverse map has every owner, through every reflink; no page has to store its owners.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from daxemu.errors import CorruptMetadata
from daxemu.events import Emit, FileDamaged
from daxemu.fs.inode import RESERVED_INO
from daxemu.fs.namespace import Namespace
from daxemu.fs.pmd_fault import pmd_ranges
from daxemu.fs.rmap import METADATA_INO, Rmap
from daxemu.mm.incident import MappingRange
from daxemu.mm.memory_failure import MemoryFailures
from daxemu.pmem.dax_device import DaxDevice
from daxemu.ranges import Range
from daxemu.uapi import MF_MEM_PRE_REMOVE, U64_MAX
from daxemu.units import PFN_PHYS, blocks_of


class FailedRanges(NamedTuple):
    """File ranges of failed device bytes. ``has_metadata``: the filesystem's own records are among them."""

    files: list[MappingRange]
    has_metadata: bool


def failed_ranges(dax: DaxDevice, rmap: Rmap, names: Namespace, failed: Range) -> FailedRanges:
    """Return every file range that uses any of the device bytes ``failed``, through every reflink.

    Blocks that a repair strategy has reserved are in no file: no process maps them, and the file whose copy
    they hold has not failed.
    """
    files: list[MappingRange] = []
    has_metadata = False
    for owner in rmap.owners(*blocks_of(failed)) if failed else ():
        if owner.ino == METADATA_INO:
            has_metadata = True
        elif owner.ino != RESERVED_INO:
            pmds = pmd_ranges(dax, rmap, names, owner, failed)
            pfn = dax.base_pfn + owner.dev_block
            files.append(MappingRange(owner.ino, owner.file_block, owner.length, pfn, pmds))
    return FailedRanges(files, has_metadata)


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
        before_poison: Callable[[], None],
    ) -> None:
        """``before_poison`` is called before any new poison, and breaks the layouts."""
        self._dax = dax
        self._rmap = rmap
        self._names = names
        self._mm = mm
        self._emit = emit
        self._shutdown = shutdown
        self._before_poison = before_poison

    def before_poison(self) -> None:
        """See DaxHolderOperations.before_poison."""
        self._before_poison()

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
        failed = Range(offset, offset + length).clip(0, self._dax.size)
        found = failed_ranges(self._dax, self._rmap, self._names, failed)
        for file in found.files:
            self._mm.mf_dax_kill_procs(file.mapping, file.index, file.count, file.pfn, flags, file.pmds)
            self._emit(
                FileDamaged(
                    ino=file.mapping,
                    path=self._names.path_of(file.mapping),
                    offset=PFN_PHYS(file.index),
                    length=PFN_PHYS(file.count),
                )
            )
        if found.has_metadata:
            reason = "Corruption of on-disk metadata detected at notify_failure.  Shutting down filesystem."
            self._mm.after_kill(partial(self._shutdown, reason))
            raise CorruptMetadata(
                "the filesystem's own records are damaged: it is shut down; unmount and run daxemu fsck"
            )
