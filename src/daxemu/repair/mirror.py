"""A second copy of every block, elsewhere on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from daxemu.errors import MediaError
from daxemu.fs.data_ops import Origin
from daxemu.ranges import Range, RangeSet
from daxemu.repair.arrays import SparseArray, discard
from daxemu.repair.by_block import ByBlock
from daxemu.repair.strategy import Failure, Options, Verdict
from daxemu.repair.volume import Volume
from daxemu.uapi import PAGE_SHIFT, PAGE_SIZE

STALE = 1
PIECE = 256
"""Blocks copied, or looked at, in one go."""


class MirrorOptions(Options, frozen=True):
    """``mapped``: whether copies of pages that are mapped for writing are believed (``trust``, an upper
    bound: the page cache shows us stores that real DAX hides) or not (``honest``).
    """

    mapped: Literal["honest", "trust"] = "honest"


class Mirror(ByBlock):
    """The copy of device block b is block b of the reserved file; a hole there says that b is zero.

    ``stale`` marks the blocks whose copy cannot be relied on: while both are written, and until the commit
    that makes a new copy's place known. A kill -9 in between leaves the mark, and the next mount copies anew.
    """

    name = "mirror"
    Options = MirrorOptions
    watches = True
    has_copies = True

    def __init__(self, volume: Volume, options: Any) -> None:
        super().__init__(volume, options)
        self._trust = options.mapped == "trust"
        self._copy = volume.reserved
        self._stale = SparseArray(volume.directory / "stale", "uint8", volume.blocks)
        self._placed = RangeSet()
        """Blocks whose copies are good, but in places that no commit knows of."""
        if not self._copy.exists:
            self._seen = 0

    def mounted(self, *, after_crash: bool) -> Iterator[Range]:
        """Copy what has no copy: after a crash what is marked; all of it if there was no mirror."""
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
        """Copy what is in use of these blocks."""
        for blocks in self.volume.in_use(piece):
            self.store_begins([blocks], Origin.SYSCALL)
            self.store_done([blocks], Origin.SYSCALL)
        return piece

    def discard(self) -> None:
        """Give the copies back."""
        self._copy.discard()
        self._stale.close()
        discard(self.volume.directory)

    def unmounting(self) -> None:
        """The marks stay, where there are any."""
        self._stale.close()

    # -- keeping the copies

    def store_begins(self, blocks: Sequence[Range], origin: Origin) -> None:
        """See that there is room for the copies, and mark them."""
        for run in self._followed(blocks):
            holes = list(RangeSet(self._copy.mapped(run)).gaps(*run))
            self._copy.map(run)  # which may commit: the marks come after it
            self._stale.fill(run, STALE)
            for hole in holes:
                self._placed.add(*hole)

    def store_done(self, blocks: Sequence[Range], origin: Origin) -> None:
        """Copy. What is poison has no new contents, and keeps its mark."""
        for run in self._followed(blocks):
            copied = RangeSet(self._readable(run))
            for part in copied:
                self._copy.write(part, self.volume.read(part))
                for settled in self._placed.gaps(*part):
                    self._stale.fill(settled, 0)
            for part in copied.gaps(*run):
                self._placed.remove(*part)

    def _readable(self, run: Range) -> Iterator[Range]:
        bad = RangeSet((r.start >> PAGE_SHIFT, -(-r.end >> PAGE_SHIFT)) for r in self.volume.poison(run))
        return bad.gaps(*run)

    def allocated(self, blocks: Range) -> None:
        """They are zero: so is their copy."""
        self._forget(blocks)

    def freed(self, blocks: Range) -> None:
        """Nobody needs their copies."""
        self._forget(blocks)

    def _forget(self, blocks: Range) -> None:
        self._copy.unmap(blocks)
        self._stale.fill(blocks, 0)
        self._placed.remove(*blocks)

    def committed(self) -> None:
        """The places of new copies are known."""
        for blocks in self._placed:
            self._stale.fill(blocks, 0)
        self._placed = RangeSet()

    # -- using them

    def failed(self, failure: Failure) -> Verdict:
        """Put the copy in the place of what is bad."""
        verdict = super().failed(failure)
        for copies in failure.copies:
            for part in self._readable(copies):
                for low in range(part.start, part.end, PIECE):
                    self._duplicate(Range(low, min(low + PIECE, part.end)))
        return verdict

    def why_not(self, block: int, failure: Failure) -> str | None:
        """See ByBlock."""
        is_marked = self._stale.get(Range(block, block + 1))[0] and block not in self._placed
        if block in failure.stale or is_marked:
            return "the copy is older than the last store"
        if block in failure.unseen and not self._trust:
            return "mapped for writing: the copy may be older than the last store"
        return None

    def restore(self, block: int) -> str | None:
        """Put the copy in its place."""
        try:
            data = self._copy.read(Range(block, block + 1))
        except MediaError:
            return "the copy is bad, too"
        self.volume.rewrite(block * PAGE_SIZE, data)
        return None

    def scrub(self) -> Iterator[Range]:
        """Make good what is bad of the copies; where the two differ nobody knows which is right."""
        for piece in self.volume.walk(PIECE):
            for blocks in self._followed(list(self.volume.in_use(piece))):
                for part in self._readable(blocks):
                    self._compare(part)
            yield piece

    def _compare(self, blocks: Range) -> None:
        if self._stale.get(blocks).any() and not self._placed.covers(*blocks):
            return
        try:
            same = self._copy.read(blocks) == self.volume.read(blocks)
        except MediaError:
            self._duplicate(blocks)
            return
        for block in range(*blocks) if not same else ():
            if self._copy.read(Range(block, block + 1)) != self.volume.read(Range(block, block + 1)):
                self.volume.corrupt(block * PAGE_SIZE, PAGE_SIZE, "scrub", repaired=False)

    def space_bytes(self) -> int:
        """The copies, and the marks."""
        return self._copy.blocks * PAGE_SIZE + self._stale.space_bytes()
