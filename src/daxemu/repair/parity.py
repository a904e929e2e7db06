"""Checksums and parity: stripes of N slices of the device, each with the XOR of its slices."""

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
from daxemu.units import DIV_ROUND_UP, blocks_of, bytes_of_blocks

CHANGING = 1
"""Between store_begins() and store_done().

After a crash in between, the next mount computes the stripe again.
"""
PIECE = 256
"""Number of blocks added up, or checked, at a time; at least one stripe."""


class ParityOptions(Options, frozen=True):
    """``slice``: bytes with one checksum. ``data``: number of slices with one slice of parity (a stripe).

    NOVA-Fortis is ``slice=512,data=8``: a stripe is the slices of one block. ``mapped`` as in MirrorOptions.
    """

    slice: int = PAGE_SIZE
    data: int = 8
    mapped: Literal["honest", "trust"] = "honest"

    def validate(self) -> None:
        """Raise InvalidArgument for an option out of range."""
        if self.slice % SECTOR_SIZE or not SECTOR_SIZE <= self.slice <= PAGE_SIZE or PAGE_SIZE % self.slice:
            raise InvalidArgument(f"slice={self.slice}: must be 512, 1024, 2048 or 4096")
        if not 2 <= self.data <= 64:
            raise InvalidArgument(f"data={self.data}: must be from 2 to 64 slices a stripe")


class Parity(ByBlock):
    """CRC32C of each slice and parity of each stripe, in arrays beside the device.

    A checksum of 0 stands for a slice that is zero or belongs to no file. Such a slice adds nothing to the
    parity, so a new device needs no stored arrays, and metadata in the same stripe does not matter.
    Invariant: the parity of a stripe that is not CHANGING is the sum (XOR) of all slices with a checksum
    other than 0.
    """

    name = "parity"
    Options = ParityOptions
    watches = True

    @classmethod
    def layout(cls, options: Any) -> str:
        """Return a name with slice size and stripe width: another geometry needs other arrays."""
        return f"{cls.name}-{options.slice}-{options.data}"

    def __init__(self, volume: Volume, options: Any) -> None:
        super().__init__(volume, options)
        self._slice: int = options.slice
        self._data: int = options.data
        self._trust = options.mapped == "trust"
        self._piece = max(1, PIECE // self._data) * self._data
        self._crc = Checksums(self._slice)
        slices = volume.blocks * PAGE_SIZE // self._slice
        stripes = DIV_ROUND_UP(slices, self._data)
        if not volume.kept.exists():
            self._seen = 0  # always a multiple of the stripe, or the number of blocks
        at = volume.kept
        self._sums = SparseArray(at / "checksums", "uint32", slices)
        self._parity = SparseArray(at / "parity", "uint8", stripes * self._slice)
        self._changing = SparseArray(at / "changing", "uint8", stripes)
        self._unknown = RangeSet()
        """Stripes of the store under way whose old contents are unknown."""

    def mounted(self, *, after_crash: bool) -> Iterator[Range]:
        """Add up all stripes without valid parity: stripes marked CHANGING, or all of a new strategy."""
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
                # After a crash free blocks were zeroed, but their old contents are still in the parity.
                area = self._bytes_of(slices)
                for free in in_use.gaps(*blocks_of(area)):
                    wrong.add(*self._stripes_of(self._slices_of(free)))
        for stripes in wrong:
            self._changing.fill(stripes, CHANGING)
        yield from self._anew(list(wrong))

    def _anew(self, wrong: list[Range]) -> Iterator[Range]:
        """Add up ``wrong`` stripes, a piece at a time. Yields the blocks of each piece."""
        most = max(1, PIECE * PAGE_SIZE // (self._slice * self._data))
        for stripes in wrong:
            for low in range(stripes.start, stripes.end, most):
                piece = Range(low, min(low + most, stripes.end))
                self._add_up(piece)
                area = self._bytes_of(Range(piece.start * self._data, piece.end * self._data))
                yield blocks_of(area)

    def unmounting(self) -> None:
        """Close the arrays, which are up to date."""
        self._close()

    def discard(self) -> None:
        """Close the arrays. registry.forget() deletes the arrays in pieces."""
        self._close()

    def _close(self) -> None:
        for array in (self._sums, self._parity, self._changing):
            array.close()

    # -- positions

    def _slices_of(self, blocks: Range) -> Range:
        return Range(blocks.start * PAGE_SIZE // self._slice, blocks.end * PAGE_SIZE // self._slice)

    def _stripes_of(self, slices: Range) -> Range:
        return Range(slices.start // self._data, DIV_ROUND_UP(slices.end, self._data))

    def _bytes_of(self, slices: Range) -> Range:
        return Range(slices.start * self._slice, slices.end * self._slice)

    # -- adding up

    def _fold(self, first: int, data: bytes | memoryview | Array) -> None:
        """XOR slices, from slice ``first`` on, into the parity of their stripes.

        A slice that is already part of the parity is removed by the same operation.
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
        """Compute parity and checksums from the blocks that belong to files.

        A stripe with poison stays CHANGING.
        """
        self._changing.fill(stripes, CHANGING)
        slices = Range(stripes.start * self._data, min(stripes.end * self._data, len(self._sums)))
        self._parity.fill(self._bytes_of(stripes), 0)
        self._sums.fill(slices, 0)
        area = self._bytes_of(slices)
        blocks = blocks_of(area)
        poisoned = self.volume.poison(blocks)
        for run in self.volume.in_use(blocks):
            for part in poisoned.gaps(*bytes_of_blocks(run).clip(*area)):
                whole = Range(DIV_ROUND_UP(part.start, self._slice), part.end // self._slice)
                if whole:
                    self._put(whole)
        damaged = RangeSet(part.outer(self._slice * self._data) for part in poisoned)
        for good in damaged.gaps(
            *self._bytes_of(Range(stripes.start * self._data, stripes.end * self._data))
        ):
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
        """Remove the old contents from the parity."""
        self._unknown = RangeSet()
        for run in self._followed(blocks):
            self._take_out(self._slices_of(run))

    def store_done(self, blocks: Sequence[Range], origin: Origin) -> None:
        """Add the new contents to the parity."""
        for run in self._followed(blocks):
            if self._unknown or self.volume.poison(run):
                self._add_up(self._stripes_of(self._slices_of(run)))
            else:
                self._put(self._slices_of(run))
                self._changing.fill(self._stripes_of(self._slices_of(run)), 0)

    def _take_out(self, slices: Range) -> None:
        """Remove slices from the parity of their stripes.

        Stripes with unknown old contents go to ``_unknown``.
        """
        stripes = self._stripes_of(slices)
        is_unknown = self._changing.get(stripes).any()
        data = None if is_unknown else self._trusted(slices)
        if data is None:
            self._unknown.add(*stripes)
        self._changing.fill(stripes, CHANGING)
        if data is not None and data.any():
            self._fold(slices.start, data)
        self._sums.fill(slices, 0)

    def freed(self, blocks: Range) -> None:
        """Remove the slices of ``blocks`` from their stripes. A stripe without any other slice is cleared."""
        for run in self._followed([blocks]):
            self._free(self._slices_of(run))

    def _free(self, slices: Range) -> None:
        whole = Range(DIV_ROUND_UP(slices.start, self._data), slices.end // self._data)
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
                self._unknown = RangeSet()
                self._take_out(edge)
                stripes = self._stripes_of(edge)
                if self._unknown:
                    self._add_up(stripes)
                else:
                    self._changing.fill(stripes, 0)

    # -- the data last written

    def _trusted(self, slices: Range) -> Array | None:
        """Return the data last written to ``slices``, read or reconstructed; None if that is impossible."""
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
        """Return the contents of a slice, if readable and with the checksum ``wanted``."""
        place = self._bytes_of(Range(number, number + 1))
        try:
            data = bytes(self.volume.read_bytes(place.start, place.length))
        except MediaError:
            return None
        return data if self._crc.match(data, wanted) else None

    def _reconstruct(self, number: int) -> bytes | None:
        """Return a slice computed from parity and the other slices of the stripe.

        None if another slice is unreadable or the result has a wrong checksum.
        """
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

    # -- checking and restoring

    def verify(self, blocks: Range) -> None:
        """Raise MediaError for bytes that differ from the data last written and cannot be reconstructed."""
        self._verify(blocks, "read")

    def _verify(self, blocks: Range, by: str) -> None:
        for run in self._followed(list(self.volume.settled(blocks))):
            poisoned = self.volume.poison(run)
            for part in poisoned.gaps(*self._bytes_of(self._slices_of(run))):
                whole = Range(DIV_ROUND_UP(part.start, self._slice), part.end // self._slice)
                if whole:
                    self._verify_readable(whole, by)

    def _verify_readable(self, slices: Range, by: str) -> None:
        place = self._bytes_of(slices)
        found = self._crc.of(self.volume.read_bytes(place.start, place.length))
        for index in np.flatnonzero(found != self._sums.get(slices)).tolist():
            number = slices.start + index
            stripe = Range(number // self._data, number // self._data + 1)
            if self._changing.get(stripe)[0]:
                continue  # no valid checksum to compare with
            at = number * self._slice
            data = self._reconstruct(number)
            if data is not None:
                self.volume.rewrite(at, data)
            self.volume.corrupt(at, self._slice, by, repaired=data is not None)
            if data is None and by == "read":
                raise MediaError(f"device {at:#x}+{self._slice:#x} has a wrong checksum")

    def why_not(self, block: int, failure: Failure) -> str | None:
        """See ByBlock."""
        if block in failure.stale:
            return "the parity is older than the last store"
        if block in failure.unseen and not self._trust:
            return "mapped for writing: the parity may be older than the last store"
        return None

    def restore(self, block: int) -> str | None:
        """Restore each poisoned slice of ``block`` from the other slices of its stripe."""
        slices = self._slices_of(Range(block, block + 1))
        poisoned = [
            (number, self._reconstruct(number))
            for number in range(*slices)
            if self.volume.poison_in(number * self._slice, self._slice)
        ]
        for number, data in poisoned:
            if data is not None:
                self.volume.rewrite(number * self._slice, data)
        if any(data is None for _, data in poisoned):
            return "more than one slice of a stripe is damaged, or the stripe was changing"
        return None

    def scrub(self) -> Iterator[Range]:
        """Verify every slice with a checksum, and add up the stripes left CHANGING by poison."""
        yield from self._anew(list(self._changing.nonzero()))
        for piece in self.volume.walk(PIECE):
            for blocks in self.volume.in_use(piece):
                self._verify(blocks, "scrub")
            yield piece

    def space_bytes(self) -> int:
        """Return the size of the arrays in bytes."""
        return sum(array.space_bytes() for array in (self._sums, self._parity, self._changing))
