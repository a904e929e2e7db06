"""Upgrade of the filesystem's records from format 2, which had no checksums, to the present format.

A page of format 2 holds 4096 bytes of its file and no trailer. The new records are written to free blocks,
and the old records stay unchanged until a superblock names the new records: an interrupted upgrade begins
anew.
"""

from __future__ import annotations

from daxemu.errors import CorruptMetadata, MediaError, NoSpace
from daxemu.fs.allocator import Allocator
from daxemu.fs.huge_allocator import allocator_for
from daxemu.fs.inode import MAX_FILE_SIZE
from daxemu.fs.metadata_page import MetadataFile
from daxemu.fs.metadata_region import MetadataRegion
from daxemu.fs.namespace import Namespace
from daxemu.fs.rmap import METADATA_INO, Rmap
from daxemu.fs.store import Store
from daxemu.fs.superblock import FORMER_VERSION, newest
from daxemu.pmem.dax_device import DaxDevice
from daxemu.ranges import Range, RangeSet, merged
from daxemu.uapi import PAGE_SIZE, Block
from daxemu.units import DIV_ROUND_UP


class _FormerRegion(MetadataRegion):
    """Metadata files of format 2, read-only."""

    version = FORMER_VERSION

    def size(self, file: MetadataFile) -> int:
        return self.pages(file) * PAGE_SIZE

    def read(self, file: MetadataFile, offset: int, length: int) -> bytes:
        first, at = divmod(offset, PAGE_SIZE)
        pages = range(first, DIV_ROUND_UP(offset + length, PAGE_SIZE))
        return b"".join(self._readable(file, page)[0] for page in pages)[at : at + length]

    def _readable(self, file: MetadataFile, page: Block) -> list[bytes]:
        """Return the copies of a page without poison, in the order of writes. Raises MediaError if both
        copies are poisoned.
        """
        good = [at[page] for at in self._places[file] if not self._dax.is_poisoned(at[page], PAGE_SIZE)]
        if not good:
            raise MediaError(f"both copies of metadata page {page} of {file.name.lower()} are poisoned")
        return [bytes(self._dax.direct_access(at, PAGE_SIZE)) for at in good]

    def check_copies(self) -> None:
        """Compare the copies of all pages. Raises CorruptMetadata if two copies differ. Precondition: the
        last end was clean, so a crash is not the reason.
        """
        for file in MetadataFile:
            for page in range(self.pages(file)):
                if len(set(self._readable(file, page))) > 1:
                    raise CorruptMetadata(
                        f"{self._dax.name}: the copies of page {page} of {file.name.lower()} differ, and "
                        "format 2 has no checksums to find the right one: copy the files off with the "
                        "daxemu that made the device, then mkfs --force"
                    )

    def blocks(self) -> list[Range]:
        """Device blocks of both files."""
        return [Range(link.dev_block, link.dev_end) for link in self._extents if link.file_block >> 40]


def is_former(dax: DaxDevice) -> bool:
    """Return True if the device holds a filesystem of format 2."""
    try:
        newest(dax, version=FORMER_VERSION)
    except CorruptMetadata:
        return False
    return True


def upgrade(dax: DaxDevice) -> None:
    """Rewrite the records of format 2 in the present format. Precondition: :func:`is_former`.

    Raises CorruptMetadata if the records are unreadable or wrong, NoSpace without room for both formats; then
    the device holds format 2 as before.
    """
    before, allocator = Allocator(dax), allocator_for(dax)
    former = _FormerRegion(dax, Rmap(), before)
    source = Store(former, dax.name)
    rmap = Rmap()
    names = Namespace(rmap)
    target = Store(MetadataRegion(dax, rmap, allocator), dax.name)
    try:
        source.open(read_only=True)
        if wrong := source.integrity_check():
            raise CorruptMetadata(f"{dax.name}: {wrong[0]}")
        source.load(names, rmap, allocator.total)
        if source.is_clean:
            former.check_copies()
        files = ((link.dev_block, link.dev_end) for link in rmap if link.ino != METADATA_INO)
        _take(allocator, dax.name, [*former.blocks(), *merged(sorted(files))])
        _mark_all(names, rmap)
        # Not clean: the next open zeroes the blocks of format 2, which are free now.
        target.format(names, rmap, after=former.superblocks.generation)
    finally:
        target.close()
        source.close()
        before.close()
        allocator.close()


def _take(allocator: Allocator, name: str, runs: list[Range]) -> None:
    try:
        for run in runs:
            allocator.take(run)
    except NoSpace as error:
        raise CorruptMetadata(f"{name}: a file has blocks of the metadata") from error


def _mark_all(names: Namespace, rmap: Rmap) -> None:
    """Have the next commit write everything."""
    for inode in names:
        names.dirty_inodes.add(inode.ino)
        names.dirty_entries |= {(inode.ino, name) for name in inode.entries or ()}
        if inode.extents is not None:
            rmap.dirty[inode.ino] = RangeSet([(0, MAX_FILE_SIZE // PAGE_SIZE)])
