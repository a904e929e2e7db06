"""Checksums and parity: N slices of the device, and what they add up to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from daxemu.errors import InvalidArgument, MediaError
from daxemu.fs.data_ops import Origin
from daxemu.ranges import Range, RangeSet
from daxemu.repair.arrays import Array, Checksums, SparseArray
from daxemu.repair.by_block import ByBlock
from daxemu.repair.strategy import Failure, Options
from daxemu.repair.volume import Volume
from daxemu.uapi import PAGE_SIZE, SECTOR_SIZE

CHANGING = 1
"""Between store_begins() and store_done(); after a crash in between the stripe is added up anew."""
PIECE = 256
"""Blocks added up, or looked at, in one go; or one stripe."""


class ParityOptions(Options, frozen=True):
    """``slice`` bytes have a checksum; ``data`` slices make a stripe with one of parity. NOVA-Fortis is
    ``slice=512,data=8``: the slices of one block. ``mapped`` as mirror's.
    """

    slice: int = PAGE_SIZE
    data: int = 8
    mapped: Literal["honest", "trust"] = "honest"

    def validate(self) -> None:
        """Raises InvalidArgument."""
        if self.slice % SECTOR_SIZE or not SECTOR_SIZE <= self.slice <= PAGE_SIZE or PAGE_SIZE % self.slice:
            raise InvalidArgument(f"slice={self.slice}: must be 512, 1024, 2048 or 4096")
        if not 2 <= self.data <= 64:
            raise InvalidArgument(f"data={self.data}: must be from 2 to 64 slices a stripe")


class Parity(ByBlock):
    """CRC32C of each slice and parity of each stripe, in arrays beside the device.

    A checksum of 0 says that the slice is zero, or no file's; such a slice adds nothing to its stripe. So a
    new device needs no arrays filled, and metadata in the same stripe does not matter. Invariant: the parity
    of a stripe that is not CHANGING is the sum (XOR) of its slices with another checksum.
    """

    name = "parity"
    Options = ParityOptions
    watches = True

    @classmethod
    def layout(cls, options: Any) -> str:
        """Another geometry is another name."""
        return f"{cls.name}-{options.slice}-{options.data}"

    def __init__(self, volume: Volume, options: Any) -> None:
        super().__init__(volume, options)
        self._slice: int = options.slice
        self._data: int = options.data
        self._trust = options.mapped == "trust"
        self._piece = max(1, PIECE // self._data) * self._data
        self._crc = Checksums(self._slice)
        slices = volume.blocks * PAGE_SIZE // self._slice
        stripes = -(-slices // self._data)
        if not volume.kept.exists():
            self._seen = 0  # always a multiple of the stripe, or all
        at = volume.kept
        self._sums = SparseArray(at / "checksums", "uint32", slices)
        self._parity = SparseArray(at / "parity", "uint8", stripes * self._slice)
        self._changing = SparseArray(at / "changing", "uint8", stripes)
        self._undone = RangeSet()
        """Stripes of the store under way whose old contents nobody knows."""

    def mounted(self, *, after_crash: bool) -> Iterator[Range]:
        """Add up what is not: stripes that were changing; on a filesystem that had no parity, everything."""
        if not self._seen:
            for piece in self.volume.walk(self._piece, self._data):
                if self.volume.in_use(piece):
                    self._add_up(self._stripes_of(self._slices_of(piece)))
                self._seen = piece.end
                yield piece
            self._seen = self.volume.blocks
            return
        wrong = RangeSet(self._changing.nonzero())
        if after_crash:
            in_use = self.volume.in_use()
            for slices in self._sums.nonzero():
                # What is free was zeroed; its stripes still have it in their sum.
                area = self._bytes_of(slices)
                for free in in_use.gaps(area.start // PAGE_SIZE, -(-area.end // PAGE_SIZE)):
                    wrong.add(*self._stripes_of(self._slices_of(free)))
        for stripes in wrong:
            self._changing.fill(stripes, CHANGING)
        yield from self._anew(list(wrong))

    def _anew(self, wrong: list[Range]) -> Iterator[Range]:
        """Add up these stripes, a piece at a time."""
        most = max(1, PIECE * PAGE_SIZE // (self._slice * self._data))
        for stripes in wrong:
            for low in range(stripes.start, stripes.end, most):
                piece = Range(low, min(low + most, stripes.end))
                self._add_up(piece)
                area = self._bytes_of(Range(piece.start * self._data, piece.end * self._data))
                yield Range(area.start // PAGE_SIZE, -(-area.end // PAGE_SIZE))

    def unmounting(self) -> None:
        """All is up to date."""
        self._close()

    def discard(self) -> None:
        """Close the arrays. They go in pieces: see registry.forget()."""
        self._close()

    def _close(self) -> None:
        for array in (self._sums, self._parity, self._changing):
            array.close()

    # -- positions

    def _slices_of(self, blocks: Range) -> Range:
        return Range(blocks.start * PAGE_SIZE // self._slice, blocks.end * PAGE_SIZE // self._slice)

    def _stripes_of(self, slices: Range) -> Range:
        return Range(slices.start // self._data, -(-slices.end // self._data))

    def _bytes_of(self, slices: Range) -> Range:
        return Range(slices.start * self._slice, slices.end * self._slice)

    # -- adding up

    def _fold(self, first: int, data: bytes | memoryview | Array) -> None:
        """Add slices, from ``first`` on, to the parity of their stripes; what is in it is taken out by
        that.
        """
        slices = np.frombuffer(data, np.uint64).reshape(-1, self._slice // 8)
        stripes = self._stripes_of(Range(first, first + len(slices)))
        lead = first - stripes.start * self._data
        padded = np.zeros((stripes.length * self._data, self._slice // 8), np.uint64)
        padded[lead : lead + len(slices)] = slices
        change = np.bitwise_xor.reduce(padded.reshape(stripes.length, self._data, -1), axis=1)
        place = self._bytes_of(stripes)
        old = self._parity.get(place).view(np.uint64)
        self._parity.set(place.start, (old ^ change.ravel()).view(np.uint8))

    def _add_up(self, stripes: Range) -> None:
        """Make parity and checksums from what files have there. A stripe with poison stays CHANGING."""
        self._changing.fill(stripes, CHANGING)
        slices = Range(stripes.start * self._data, min(stripes.end * self._data, len(self._sums)))
        self._parity.fill(self._bytes_of(stripes), 0)
        self._sums.fill(slices, 0)
        area = self._bytes_of(slices)
        blocks = Range(area.start // PAGE_SIZE, -(-area.end // PAGE_SIZE))
        bad = self.volume.poison(blocks)
        for run in self.volume.in_use(blocks):
            for part in bad.gaps(*Range(run.start * PAGE_SIZE, run.end * PAGE_SIZE).clip(*area)):
                whole = Range(-(-part.start // self._slice), part.end // self._slice)
                if whole:
                    self._put(whole)
        hurt = RangeSet(part.outer(self._slice * self._data) for part in bad)
        for good in hurt.gaps(*self._bytes_of(Range(stripes.start * self._data, stripes.end * self._data))):
            self._changing.fill(
                self._stripes_of(Range(good.start // self._slice, good.end // self._slice)), 0
            )

    def _put(self, slices: Range) -> None:
        place = self._bytes_of(slices)
        data = self.volume.read_bytes(place.start, place.length)
        sums = self._crc.of(data)
        if sums.any():
            self._fold(slices.start, data)
            self._sums.set(slices.start, sums)

    # -- following stores

    def store_begins(self, blocks: Sequence[Range], origin: Origin) -> None:
        """Take the old contents out of the sums."""
        self._undone = RangeSet()
        for run in self._followed(blocks):
            self._take_out(self._slices_of(run))

    def store_done(self, blocks: Sequence[Range], origin: Origin) -> None:
        """Add the new contents to the sums."""
        for run in self._followed(blocks):
            if self._undone or self.volume.poison(run):
                self._add_up(self._stripes_of(self._slices_of(run)))
            else:
                self._put(self._slices_of(run))
                self._changing.fill(self._stripes_of(self._slices_of(run)), 0)

    def _take_out(self, slices: Range) -> None:
        """Slices are no part of their stripes any more; where that cannot be done, stripes are
        ``_undone``.
        """
        stripes = self._stripes_of(slices)
        undone = self._changing.get(stripes).any()
        data = None if undone else self._trusted(slices)
        if data is None:
            self._undone.add(*stripes)
        self._changing.fill(stripes, CHANGING)
        if data is not None and data.any():
            self._fold(slices.start, data)
        self._sums.fill(slices, 0)

    def freed(self, blocks: Range) -> None:
        """They are no part of their stripes; stripes of nothing else become nothing."""
        for run in self._followed([blocks]):
            self._free(self._slices_of(run))

    def _free(self, slices: Range) -> None:
        whole = Range(-(-slices.start // self._data), slices.end // self._data)
        if whole:
            area = Range(whole.start * self._data, whole.end * self._data)
            self._sums.fill(area, 0)
            self._parity.fill(self._bytes_of(whole), 0)
            self._changing.fill(whole, 0)
            edges = [Range(slices.start, area.start), Range(area.end, slices.end)]
        else:
            edges = [slices]
        for edge in edges:
            if edge and self._sums.get(edge).any():
                self._undone = RangeSet()
                self._take_out(edge)
                stripes = self._stripes_of(edge)
                if self._undone:
                    self._add_up(stripes)
                else:
                    self._changing.fill(stripes, 0)

    # -- what was written

    def _trusted(self, slices: Range) -> Array | None:
        """What was written to ``slices``, read or made from the others; None if that cannot be said."""
        wanted = self._sums.get(slices)
        rows = np.zeros((slices.length, self._slice), np.uint8)
        if not wanted.any():
            return rows
        doubtful = np.flatnonzero(wanted)
        place = self._bytes_of(slices)
        if not self.volume.poison_in(place.start, place.length):
            there = self.volume.read_bytes(place.start, place.length)
            known = wanted == self._crc.of(there)
            rows[:] = np.frombuffer(there, np.uint8).reshape(rows.shape)
            rows[wanted == 0] = 0
            doubtful = np.flatnonzero((wanted != 0) & ~known)
        for row in doubtful.tolist():
            number = slices.start + row
            data = self._read(number, int(wanted[row])) or self._reconstruct(number)
            if data is None:
                return None
            rows[row] = np.frombuffer(data, np.uint8)
        return rows

    def _read(self, number: int, wanted: int) -> bytes | None:
        """A slice as it is, if that is what was written."""
        place = self._bytes_of(Range(number, number + 1))
        try:
            data = bytes(self.volume.read_bytes(place.start, place.length))
        except MediaError:
            return None
        return data if self._crc.match(data, wanted) else None

    def _reconstruct(self, number: int) -> bytes | None:
        """A slice from the others of its stripe, if they and the parity add up to what was written."""
        stripe = number // self._data
        if self._changing.get(Range(stripe, stripe + 1))[0]:
            return None
        wanted = int(self._sums.get(Range(number, number + 1))[0])
        if not wanted:
            return bytes(self._slice)
        total = self._parity.get(self._bytes_of(Range(stripe, stripe + 1)))
        first = stripe * self._data
        others = self._sums.get(Range(first, min(first + self._data, len(self._sums))))
        for other, other_sum in enumerate(others.tolist(), first):
            if other != number and other_sum:
                data = self._read(other, other_sum)
                if data is None:
                    return None
                total ^= np.frombuffer(data, np.uint8)
        found = total.tobytes()
        return found if self._crc.match(found, wanted) else None

    # -- finding and mending

    def verify(self, blocks: Range) -> None:
        """Raises MediaError for bytes that are not what was written, and cannot be made so."""
        self._verify(blocks, "read")

    def _verify(self, blocks: Range, by: str) -> None:
        for run in self._followed([blocks]):
            bad = self.volume.poison(run)
            for part in bad.gaps(*self._bytes_of(self._slices_of(run))):
                whole = Range(-(-part.start // self._slice), part.end // self._slice)
                if whole:
                    self._verify_readable(whole, by)

    def _verify_readable(self, slices: Range, by: str) -> None:
        place = self._bytes_of(slices)
        found = self._crc.of(self.volume.read_bytes(place.start, place.length))
        for index in np.flatnonzero(found != self._sums.get(slices)).tolist():
            number = slices.start + index
            stripe = Range(number // self._data, number // self._data + 1)
            if self._changing.get(stripe)[0]:
                continue  # nobody knows what it should be
            at = number * self._slice
            data = self._reconstruct(number)
            if data is not None:
                self.volume.rewrite(at, data)
            self.volume.corrupt(at, self._slice, by, repaired=data is not None)
            if data is None and by == "read":
                raise MediaError(f"device {at:#x}+{self._slice:#x} is not what was written")

    def why_not(self, block: int, failure: Failure) -> str | None:
        """See ByBlock."""
        if block in failure.stale:
            return "the parity is older than the last store"
        if block in failure.unseen and not self._trust:
            return "mapped for writing: the parity may be older than the last store"
        return None

    def restore(self, block: int) -> str | None:
        """Make each bad slice from the others of its stripe."""
        slices = self._slices_of(Range(block, block + 1))
        hurt = [
            (number, self._reconstruct(number))
            for number in range(*slices)
            if self.volume.poison_in(number * self._slice, self._slice)
        ]
        for number, data in hurt:
            if data is not None:
                self.volume.rewrite(number * self._slice, data)
        if any(data is None for _, data in hurt):
            return "more of a stripe is bad than its parity makes good, or it was changing"
        return None

    def scrub(self) -> Iterator[Range]:
        """Verify everything that has a checksum, and add up the stripes that poison had kept from it."""
        yield from self._anew(list(self._changing.nonzero()))
        for piece in self.volume.walk(PIECE):
            for blocks in self.volume.in_use(piece):
                self._verify(blocks, "scrub")
            yield piece

    def space_bytes(self) -> int:
        """The arrays."""
        return sum(array.space_bytes() for array in (self._sums, self._parity, self._changing))
