"""A second copy of every block, elsewhere on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from daxemu.errors import MediaError
from daxemu.fs.data_ops import Origin
from daxemu.ranges import Range, RangeSet
from daxemu.repair.arrays import Checksums, SparseArray
from daxemu.repair.by_block import ByBlock
from daxemu.repair.strategy import Failure, Options, Verdict
from daxemu.repair.volume import Volume
from daxemu.uapi import PAGE_SIZE
from daxemu.units import DIV_ROUND_UP, PHYS_PFN

STALE = 1
PIECE = 256
"""Number of blocks copied, or checked, at a time."""


class MirrorOptions(Options, frozen=True):
    """Options ``mapped`` and ``checksum``.

    ``mapped``: use the copy of a page that is mapped for writing (``trust``), or not (``honest``). ``trust``
    gives an upper bound: the page cache shows stores to the filesystem that real DAX hides. ``checksum``:
    keep a CRC32C of each block, to know which of two different copies is right.
    """

    mapped: Literal["honest", "trust"] = "honest"
    checksum: Literal["no", "yes"] = "no"


class Mirror(ByBlock):
    """Copy of device block b in block b of the reserved file; a hole stands for a block of zeros.

    The array ``stale`` marks blocks whose copy may be out of date: while block and copy are written, and
    until the commit that records the place of a new copy. After a kill -9 in between, the mark is still set,
    and the next mount copies the block again.
    """

    name = "mirror"
    Options = MirrorOptions
    watches = True
    has_copies = True

    @classmethod
    def layout(cls, options: Any) -> str:
        """Return another name with checksums: blocks written without checksums have none."""
        return f"{cls.name}-crc32c" if options.checksum == "yes" else cls.name

    def __init__(self, volume: Volume, options: Any) -> None:
        super().__init__(volume, options)
        self._trust = options.mapped == "trust"
        self._copy = volume.reserved
        self._stale = SparseArray(volume.kept / "stale", "uint8", volume.blocks)
        self._crc = Checksums(PAGE_SIZE)
        self._sums: SparseArray | None = None
        if options.checksum == "yes":
            self._sums = SparseArray(volume.kept / "checksums", "uint32", volume.blocks)
        self._placed = RangeSet()
        """Blocks with an up-to-date copy whose place no commit has recorded."""
        if not self._copy.exists:
            self._seen = 0

    def mounted(self, *, after_crash: bool) -> Iterator[Range]:
        """Copy each block without an up-to-date copy: the marked blocks, or all blocks of a new mirror."""
        for marked in list(self._stale.nonzero()):
            for low in range(marked.start, marked.end, PIECE):
                yield self._duplicate(Range(low, min(low + PIECE, marked.end)))
        self._copy.create()
        if not self._seen:
            for piece in self.volume.walk(PIECE):
                self._seen = piece.end
                yield self._duplicate(piece)
            self._seen = self.volume.blocks

    def _duplicate(self, piece: Range) -> Range:
        """Copy the blocks of ``piece`` that belong to files. Return ``piece``."""
        for blocks in self.volume.in_use(piece):
            self.store_begins([blocks], Origin.SYSCALL)
            self.store_done([blocks], Origin.SYSCALL)
        return piece

    def discard(self) -> None:
        """Close the arrays. registry.forget() deletes the repair data in pieces."""
        self.unmounting()

    def unmounting(self) -> None:
        """Close the arrays. Marks stay set."""
        self._stale.close()
        if self._sums is not None:
            self._sums.close()

    # -- copying

    def store_begins(self, blocks: Sequence[Range], origin: Origin) -> None:
        """Allocate blocks for the copies, and mark the copies as stale."""
        for run in self._followed(blocks):
            holes = list(RangeSet(self._copy.mapped(run)).gaps(*run))
            self._copy.map(run)  # may commit, and a commit clears marks: so mark afterwards
            self._stale.fill(run, STALE)
            for hole in holes:
                self._placed.add(*hole)

    def store_done(self, blocks: Sequence[Range], origin: Origin) -> None:
        """Copy the stored blocks. A block that is still poisoned has no new contents, and stays marked."""
        for run in self._followed(blocks):
            copied = RangeSet(self._readable(run))
            for part in copied:
                data = self.volume.read(part)
                self._copy.write(part, data)
                if self._sums is not None:
                    self._sums.set(part.start, self._crc.of(data))
                for settled in self._placed.gaps(*part):
                    self._stale.fill(settled, 0)
            for part in copied.gaps(*run):
                self._placed.remove(*part)

    def _readable(self, run: Range) -> Iterator[Range]:
        poisoned = RangeSet(
            (PHYS_PFN(r.start), DIV_ROUND_UP(r.end, PAGE_SIZE)) for r in self.volume.poison(run)
        )
        return poisoned.gaps(*run)

    def allocated(self, blocks: Range) -> None:
        """Drop the copies: a hole stands for a block of zeros."""
        self._forget(blocks)

    def freed(self, blocks: Range) -> None:
        """Drop the copies of free blocks."""
        self._forget(blocks)

    def _forget(self, blocks: Range) -> None:
        self._copy.unmap(blocks)
        self._stale.fill(blocks, 0)
        self._placed.remove(*blocks)
        if self._sums is not None:
            self._sums.fill(blocks, 0)

    def committed(self) -> None:
        """Clear the marks of new copies, whose places are now recorded."""
        for blocks in self._placed:
            self._stale.fill(blocks, 0)
        self._placed = RangeSet()

    # -- restoring

    def failed(self, failure: Failure) -> Verdict:
        """Restore failed blocks from the copies, and copy again each block with a failed copy."""
        verdict = super().failed(failure)
        for copies in failure.copies:
            for part in self._readable(copies):
                for low in range(part.start, part.end, PIECE):
                    self._duplicate(Range(low, min(low + PIECE, part.end)))
        return verdict

    def why_not(self, block: int, failure: Failure) -> str | None:
        """See ByBlock."""
        if block in failure.stale or self._is_marked(block):
            return "the copy is older than the last store"
        if block in failure.unseen and not self._trust:
            return "mapped for writing: the copy may be older than the last store"
        return None

    def _is_marked(self, block: int) -> bool:
        return bool(self._stale.get(Range(block, block + 1))[0]) and block not in self._placed

    def restore(self, block: int) -> str | None:
        """Restore ``block`` from its copy."""
        data = self._good_copy(block)
        if data is None:
            return "the copy is damaged, too"
        self.volume.rewrite(block * PAGE_SIZE, data)
        return None

    def _good_copy(self, block: int) -> bytes | None:
        """Return the copy of a block; None if the copy is poisoned or has a wrong checksum."""
        try:
            data = self._copy.read(Range(block, block + 1))
        except MediaError:
            return None
        return data if self._sums is None or self._matches(block, data) else None

    def _matches(self, block: int, data: bytes | memoryview) -> bool:
        assert self._sums is not None
        return self._crc.match(data, int(self._sums.get(Range(block, block + 1))[0]))

    def verify(self, blocks: Range) -> None:
        """Raise MediaError for a block with a wrong checksum and no valid copy.

        Without checksums nothing is checked.
        """
        self._verify(blocks, "read")

    def _verify(self, blocks: Range, by: str) -> None:
        for run in self._followed([blocks]) if self._sums is not None else ():
            for part in self._readable(run):
                assert self._sums is not None
                wrong = np.flatnonzero(self._crc.of(self.volume.read(part)) != self._sums.get(part))
                for index in wrong.tolist():
                    self._correct(part.start + index, by)

    def _correct(self, block: int, by: str) -> None:
        if self._is_marked(block):
            return  # no valid checksum to compare with
        at, data = block * PAGE_SIZE, self._good_copy(block)
        if data is not None:
            self.volume.rewrite(at, data)
        self.volume.corrupt(at, PAGE_SIZE, by, repaired=data is not None)
        if data is None and by == "read":
            raise MediaError(f"device {at:#x}+{PAGE_SIZE:#x} has a wrong checksum, and so has its copy")

    def scrub(self) -> Iterator[Range]:
        """Correct corrupt copies and blocks.

        Where block and copy differ, the checksum tells which is right. Without checksums only the difference
        is reported.
        """
        for piece in self.volume.walk(PIECE):
            for blocks in self._followed(list(self.volume.in_use(piece))):
                for part in self._readable(blocks):
                    for settled in self.volume.settled(part):
                        self._compare(settled)
            yield piece

    def _compare(self, blocks: Range) -> None:
        if self._stale.get(blocks).any() and not self._placed.covers(*blocks):
            return
        self._verify(blocks, "scrub")
        try:
            same = self._copy.read(blocks) == self.volume.read(blocks)
        except MediaError:
            self._duplicate(blocks)
            return
        for block in range(*blocks) if not same else ():
            self._compare_one(Range(block, block + 1))

    def _compare_one(self, block: Range) -> None:
        data = self.volume.read(block)
        if self._copy.read(block) == data:
            return
        is_right = self._sums is not None and self._matches(block.start, data)
        if is_right:
            self._copy.write(block, data)
        elif self._sums is not None:
            return  # both are wrong; _verify() has reported the block
        self.volume.corrupt(block.start * PAGE_SIZE, PAGE_SIZE, "scrub", repaired=is_right)

    def space_bytes(self) -> int:
        """Return the size of the copies, the marks and the checksums, in bytes."""
        arrays = [self._stale, *([self._sums] if self._sums is not None else [])]
        return self._copy.blocks * PAGE_SIZE + sum(array.space_bytes() for array in arrays)
