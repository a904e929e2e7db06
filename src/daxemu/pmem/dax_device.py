"""Dax device, the object that a filesystem maps (drivers/dax/super.c, and access to the media as in
fs/dax.c).

A :class:`DaxDevice` has one *holder*, the filesystem. The device notifies its holder of failures by range.
Offsets are device bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from daxemu.errors import Busy, InvalidArgument, MediaError, NoDevice, Unsupported
from daxemu.events import Emit, NotifyFailure
from daxemu.notifier import NotifierChain
from daxemu.pmem.badblocks import Badblocks
from daxemu.pmem.media import Media, Memory
from daxemu.ranges import ByteRange, InBytes, RangeSet
from daxemu.uapi import MF_MEM_PRE_REMOVE, PAGE_SIZE, SECTOR_SIZE, U64_MAX, Pfn
from daxemu.units import bytes_of_sectors, sector_at, sectors_at, sectors_of


class DaxHolderOperations(Protocol):
    """Operations of a holder that the device calls (``struct dax_holder_operations``)."""

    def notify_failure(self, offset: int, length: int, flags: int) -> None:
        """Handle a failure of the device bytes ``[offset, offset + length)``; ``(0, U64_MAX)`` is the whole
        device.

        Raises Unsupported (-EOPNOTSUPP) to have the generic handler run, any other DaxemuError for a failed
        handling.
        """

    def before_poison(self) -> None:
        """Break grants that new poison makes wrong. Called before any new poison."""


class DaxDevice:
    """Dax device: ``size`` bytes of ``media`` from ``data_offset`` on, the bad blocks, and the holder.

    ``base_pfn`` is the page frame of device byte 0. ``align``: the largest page, in bytes, that maps the
    device; device byte 0 is aligned to this size. ``mkpage_present`` is called with device bytes whose
    poison was cleared, to update their struct pages. ``emit`` gets an event for each call to the holder.
    """

    def __init__(
        self,
        name: str,
        media: Media,
        data_offset: int,
        badblocks: Badblocks,
        base_pfn: Pfn,
        align: int,
        mkpage_present: Callable[[ByteRange], None],
        emit: Emit,
    ) -> None:
        self.name = name
        self.base_pfn = base_pfn
        self.align = align
        self.size = media.size - data_offset
        self.alive = True
        self.is_leaving = False
        """True after the holder was notified of a removal. The device serves its bytes until
        :meth:`kill_dax`.
        """
        self.badblocks = badblocks
        self._media = media
        self._data_offset = data_offset
        self._holder: DaxHolderOperations | None = None
        self._mkpage_present = mkpage_present
        self._emit = emit
        self.before_punch: NotifierChain[[ByteRange]] = NotifierChain()
        """Called with device bytes about to be poisoned, if the media then takes their pages from every
        process (:attr:`Media.is_direct`).
        """

    # -- who holds it

    def hold(self, holder: DaxHolderOperations) -> None:
        """Become the holder (``fs_dax_get()``). Raises Busy if the device is held, NoDevice after
        kill_dax().
        """
        if not self.alive:
            raise NoDevice(f"{self.name}: the device is gone")
        if self._holder is not None:
            raise Busy(f"{self.name}: already held by a filesystem")
        self._holder = holder

    def release(self, holder: DaxHolderOperations) -> None:
        """End the role of ``holder`` (``fs_put_dax()``). Does nothing for any other object."""
        if self._holder is holder:
            self._holder = None

    def dax_is_idle(self) -> bool:
        """Return True without a holder."""
        return self._holder is None

    def notify_failure(self, offset: int, length: int, flags: int) -> None:
        """Notify the holder of a failed range, in one call (``dax_holder_notify_failure()``).

        Raises NoDevice (-ENXIO) for a dead device, Unsupported (-EOPNOTSUPP) without a holder. Exceptions of
        the holder propagate.
        """
        if not self.alive:
            raise NoDevice(f"{self.name}: the device is gone")
        if self._holder is None:
            raise Unsupported(f"{self.name}: no holder")
        self._emit(NotifyFailure(offset=offset, length=length, flags=flags))
        self._holder.notify_failure(offset, length, flags)

    def pre_remove(self) -> None:
        """Notify the holder of the removal of the whole device, once: the first half of ``kill_dax()``.
        Raises NoDevice for a second call.
        """
        if self.is_leaving:
            raise NoDevice(f"{self.name}: removed already")
        self.is_leaving = True
        if self._holder is not None:
            self.notify_failure(0, U64_MAX, MF_MEM_PRE_REMOVE)

    def kill_dax(self) -> None:
        """Remove the device (surprise removal): call :meth:`pre_remove`, unless done before, and mark the
        device as dead. Raises NoDevice for a dead device.
        """
        if not self.alive:
            raise NoDevice(f"{self.name}: removed already")
        try:
            if not self.is_leaving:
                self.pre_remove()
        finally:
            self.alive = False
            self._holder = None

    # -- the bytes

    def _check(self, offset: int, length: int) -> None:
        if not self.alive:
            raise NoDevice(f"{self.name}: the device is gone")
        if offset < 0 or length < 0 or offset + length > self.size:
            raise InvalidArgument(f"{self.name}: {offset:#x}+{length:#x} is outside the device")

    def check_readable(self, offset: int, length: int) -> None:
        """Check a range for poison. Raises MediaError if any byte is poison, NoDevice after a removal."""
        self._check(offset, length)
        if self.is_poisoned(offset, length):
            raise MediaError(f"{self.name}: poison in {offset:#x}+{length:#x}", self.poisoned(offset, length))

    @property
    def has_poison(self) -> bool:
        """Return True if any byte of the media is poison, bad block or latent."""
        return bool(self._media.poison)

    def is_poisoned(self, offset: int, length: int) -> bool:
        """Return True if any byte of the range is poison, bad block or latent."""
        return self._media.is_poisoned(self._data_offset + offset, length)

    def poisoned(self, offset: int, length: int) -> list[ByteRange]:
        """Return the poisoned device byte ranges (whole sectors) that overlap the range, bad blocks or
        latent.
        """
        at = self._data_offset
        return [part.moved(-at) for part in self._media.poisoned(at + offset, length)]

    def poisoned_in_pieces(self, part: ByteRange, count: int) -> Iterator[list[ByteRange]]:
        """Yield as :meth:`poisoned`, up to ``count`` ranges at a time. The poison may change between two
        pieces.
        """
        at = sector_at(self._data_offset)
        for poisoned in self._media.poison.in_pieces(*sectors_of(part).moved(at), count):
            yield [bytes_of_sectors(sectors.moved(-at)) for sectors in poisoned]

    def poisoned_pages(self, part: ByteRange) -> RangeSet[InBytes]:
        """Return the pages of ``part`` with poison, as byte ranges."""
        whole = part.outer(PAGE_SIZE)
        return RangeSet(poisoned.outer(PAGE_SIZE) for poisoned in self.poisoned(whole.start, whole.length))

    def direct_access(self, offset: int, length: int) -> memoryview:
        """Return the live bytes of the range for reading or writing (``dax_direct_access``).

        Raises MediaError if any byte is poison, or if a part of the range is on pages that are put aside
        (see :meth:`read` and :meth:`pieces`), NoDevice after a removal. Precondition: the range is reserved.
        """
        self.check_readable(offset, length)
        return self._media.view(self._data_offset + offset, length)

    def pieces(self, offset: int, length: int) -> list[ByteRange]:
        """Return the range in pieces that :meth:`direct_access` takes: readable bytes of pages put aside, and
        of others.
        """
        at = self._data_offset
        return [part.moved(-at) for part in self._media.pieces(at + offset, length)]

    def read(self, offset: int, length: int) -> bytes | memoryview:
        """Return the bytes of the range, for reading only. Raises MediaError if any byte is poison, NoDevice
        after a removal.
        """
        self.check_readable(offset, length)
        found = [self.direct_access(part.start, part.length) for part in self.pieces(offset, length)]
        return found[0] if len(found) == 1 else b"".join(found)

    def written(self) -> Iterator[memoryview]:
        """Yield each run of the whole media that has data, the altmap and poisoned bytes included."""
        return self._media.written()

    def strays(self) -> list[ByteRange]:
        """See Media.strays(). Return byte ranges of the device."""
        at = self._data_offset
        return [page.moved(-at) for page in self._media.strays()]

    def drop_strays(self, offset: int, length: int) -> None:
        """See Media.drop_strays(). Bytes of the device."""
        self._media.drop_strays(self._data_offset + offset, length)

    def memory(self) -> Memory:
        """Return the place of device byte 0 and the bytes behind, for C code."""
        return self._media.memory(self._data_offset)

    def copy_from_iter(self, offset: int, data: bytes | memoryview) -> None:
        """Write to blocks that are not in use yet (``dax_copy_from_iter()``), reserved or not.

        Raises MediaError if any byte is poison, NoDevice after a removal, NoSpace without memory for an
        unreserved range.
        """
        self.check_readable(offset, len(data))
        self._media.store(self._data_offset + offset, data)

    def recovery_write(self, offset: int, data: bytes | memoryview) -> list[ByteRange]:
        """Write whole sectors over poison. The write clears the poison and its bad blocks
        (``dax_recovery_write``).

        Returns the byte ranges that were poison. Precondition: sector-aligned at both ends. Raises NoSpace
        without memory for a range that is not reserved.
        """
        self._check(offset, len(data))
        if offset % SECTOR_SIZE or len(data) % SECTOR_SIZE:
            raise InvalidArgument("a write over poison must cover whole sectors")
        cleared = self.clear_poison(offset, len(data))
        self._media.overwrite(self._data_offset + offset, data)
        return cleared

    def clear_poison(self, offset: int, length: int) -> list[ByteRange]:
        """Make the range readable (``pmem_clear_poison()``). Return the byte ranges that were poison.

        Precondition: the caller overwrites, or discards and reserves, the returned ranges next.
        """
        sectors = sectors_at(offset, length)
        self.badblocks.clear(sectors.start, sectors.length)
        at = sector_at(self._data_offset)
        cleared = self._media.clear_poison(sectors.moved(at))
        good = [bytes_of_sectors(part.moved(-at)) for part in cleared]
        for part in good:
            self._mkpage_present(part)
        return good

    def clearing(self, ranges: Iterable[ByteRange]) -> AbstractContextManager[None]:
        """Context in which the byte ranges are cleared: see Media.clearing()."""
        at = sector_at(self._data_offset)
        return self._media.clearing(sectors_of(part).moved(at) for part in ranges)

    def make_room_for_poison(self, changes: int) -> None:
        """See Media.make_room()."""
        self._media.make_room(changes)

    def add_poison(self, *ranges: ByteRange) -> list[ByteRange]:
        """Poison byte ranges of the hardware. Return the ranges rounded out to sectors. No process or holder
        is notified.
        """
        for start, end in ranges:
            self._check(start, end - start)
        if self._holder is not None:
            self._holder.before_poison()
        poisoned = [sectors_of(part) for part in ranges]
        for sectors in poisoned if self._media.is_direct else ():
            self.before_punch.call_chain(bytes_of_sectors(sectors).outer(PAGE_SIZE))
        at = sector_at(self._data_offset)
        self._media.add_poison(*(sectors.moved(at) for sectors in poisoned))
        return [bytes_of_sectors(sectors) for sectors in poisoned]

    def zero(self, offset: int, length: int) -> None:
        """Store zeros (``dax_zero_page_range``). Precondition: reserved. Raises MediaError on poison."""
        self.check_readable(offset, length)
        for part in self.pieces(offset, length):
            self.direct_access(part.start, part.length)[:] = bytes(part.length)

    def reserve(self, offset: int, length: int) -> None:
        """Back the range with memory before its first use, except pages put aside. Raises NoSpace."""
        self._check(offset, length)
        self._media.reserve(self._data_offset + offset, length)

    def discard_limit(self, offset: int, length: int, step: int) -> int:
        """Return how many bytes of the range one :meth:`discard` may take, so that at most ``step`` bytes of
        memory are given back. The range may be terabytes without memory.
        """
        limit = step
        while limit < length:
            pages = self._media.count_pages(self._data_offset + offset, min(2 * limit, length))
            if pages is None or pages * PAGE_SIZE > step:
                return limit
            limit *= 2
        return length

    def discard(self, offset: int, length: int) -> None:
        """Give the memory of the range back. After the next reserve, the range reads as zeros."""
        if self.alive:
            self._media.release(self._data_offset + offset, length)
