"""Metadata region: the filesystem's own records on the device. Two superblocks, and two files of blocks with
two copies of each block.

    first 16 blocks     superblock: place of the files below, generation, checksum
    16 in the middle    second superblock, equal to the first
    anywhere            "db" and "wal", which fs/metadata_vfs.py gives to SQLite; each has two replicas of its
                        blocks

The region belongs to ``METADATA_INO`` in the reverse map, like the extents of a file, so that poison in the
region is found as metadata poison. Each page of each replica is sealed (fs/metadata_page.py). A page that is
poisoned, corrupt or stale is read from the other replica. A read rewrites a corrupt or stale copy, a write
rewrites both copies.

Invariants:
- Both replicas of a file are equally long, and every page of a file has been sealed.
- A write is complete in one replica before the other is touched: a torn write leaves one copy of each page.
- A page's generation grows with each write, across mounts too: its upper half is the superblock's generation.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator

from daxemu.errors import CorruptMetadata, MediaError, NoSpace
from daxemu.fs.allocator import Allocator
from daxemu.fs.extents import ExtentMap
from daxemu.fs.metadata_page import (
    PAYLOAD,
    Copy,
    CopyState,
    MetadataDamage,
    MetadataFile,
    generation_of,
    is_intact,
    pages_of,
    seal,
)
from daxemu.fs.rmap import METADATA_INO, Rmap
from daxemu.fs.superblock import SUPER_BLOCKS, VERSION, Superblocks
from daxemu.pmem.dax_device import DaxDevice
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE, Block
from daxemu.units import DIV_ROUND_UP, byte_span

REPLICAS = 2
_SEALED_AT_ONCE = 256  # pages of a new extent that one store seals


OnRewrite = Callable[[str, int, int, CopyState], None]
"""Called with the name of a file, the page, the copy (1 or 2) and the state, after a bad copy was
rewritten.
"""


def _base(file: MetadataFile, replica: int) -> Block:
    """Return the file block of METADATA_INO at which a replica begins."""
    return (1 + file * REPLICAS + replica) << 40


class MetadataRegion:
    """Blocks of METADATA_INO. Sizes and offsets inside a file are bytes."""

    version = VERSION
    """Format that :meth:`load` accepts."""

    def __init__(
        self,
        dax: DaxDevice,
        rmap: Rmap,
        allocator: Allocator,
        on_rewrite: OnRewrite = lambda file, page, copy, state: None,
    ) -> None:
        """Claim the blocks of the superblocks. The caller then calls :meth:`format` or :meth:`load`."""
        self._dax = dax
        self._allocator = allocator
        self._rmap = rmap
        self._extents = ExtentMap(METADATA_INO, rmap)
        self._places = [[array("Q") for _ in range(REPLICAS)] for _ in MetadataFile]
        self._ends = [[array("Q") for _ in range(REPLICAS)] for _ in MetadataFile]
        """By file, replica and page: device offset in bytes of the page, and of the end of the run of the
        page.
        """
        self._growth: Iterator[None] = iter(())
        self._last_written = (MetadataFile.DB, -1, memoryview(b""))
        self._page_generation = 0
        self._is_published = True
        self.is_read_only = False
        """True if reads do not rewrite a bad copy."""
        self._on_rewrite = on_rewrite
        self.superblocks = Superblocks(dax)
        for index, blocks in enumerate(self.superblocks.blocks):
            allocator.take(blocks)
            self._extents.insert(index * SUPER_BLOCKS, blocks.start, blocks.length)
            dax.reserve(*byte_span(blocks))

    # -- life

    def prepare(self, after: int) -> None:
        """Begin a new filesystem. No superblock names the filesystem before :meth:`format`, so a crash leaves
        no filesystem. ``after``: the generation of the replaced filesystem, or 0.
        """
        self._is_published = False
        self.superblocks.generation = after

    def format(self) -> None:
        """Write the superblocks of a new filesystem, with the present files."""
        self._allocator.discard_free()  # a first mount that was killed may have left data
        self._is_published = True
        self._publish()
        self._page_generation = self.superblocks.generation << 32

    def load(self) -> None:
        """Claim the blocks that the newest readable superblock names. Raises CorruptMetadata."""
        superblock = self.superblocks.load(version=self.version)
        self._page_generation = superblock.generation << 32
        for file_block, dev_block, length in superblock.runs:
            self._claim(file_block, Range(dev_block, dev_block + length))
        for file in MetadataFile:
            sizes = {self._length(_base(file, replica)) for replica in range(REPLICAS)}
            if len(sizes) != 1:
                raise CorruptMetadata(f"{self._dax.name}: the superblock's replicas differ in size")
            self._place(file, 0, sizes.pop())

    def begin(self) -> None:
        """Begin a mount that writes: rewrite the superblocks, with a generation above that of any page."""
        states = self.superblocks.states()
        for copy, (blocks, state) in enumerate(zip(self.superblocks.blocks, states, strict=True), 1):
            if state in (CopyState.CORRUPT, CopyState.STALE):
                self._on_rewrite("superblock", blocks.start, copy, state)
        self._publish()
        self._page_generation = self.superblocks.generation << 32

    def _place(self, file: MetadataFile, first: Block, end: Block) -> None:
        """Record the place of the pages ``[first, end)``. Precondition: the pages are mapped."""
        for replica, places in enumerate(self._places[file]):
            base = _base(file, replica)
            for run in self._extents.runs(base + first, base + end):
                start = run.dev_block * PAGE_SIZE
                run_end = start + run.length * PAGE_SIZE
                places.extend(range(start, run_end, PAGE_SIZE))
                self._ends[file][replica].extend([run_end] * run.length)

    def _claim(self, file_block: Block, run: Range) -> None:
        if not run or run.start < 0 or run.end > self._allocator.total or not 1 <= file_block >> 40 <= 4:
            raise CorruptMetadata(f"{self._dax.name}: the superblock names blocks outside the device")
        if any(there.link is not None for there in self._extents.runs(file_block, file_block + run.length)):
            raise CorruptMetadata(f"{self._dax.name}: the superblock's runs overlap")
        try:
            self._allocator.take(run)
        except NoSpace as error:
            raise CorruptMetadata(f"{self._dax.name}: the superblock names blocks twice") from error
        self._dax.reserve(*byte_span(run))
        self._extents.insert(file_block, run.start, run.length)

    def _length(self, base: Block) -> int:
        """Return the number of mapped blocks of a replica. Raises CorruptMetadata for a replica with a
        hole.
        """
        runs = self._extents.lookup(base, base + (1 << 40))
        if any(run.link is None for run in runs[:-1]):
            raise CorruptMetadata(f"{self._dax.name}: a replica has a hole")
        return sum(run.length for run in runs if run.link is not None)

    # -- the files

    def size(self, file: MetadataFile) -> int:
        """Return the number of bytes that the file has room for."""
        return self.pages(file) * PAYLOAD

    def pages(self, file: MetadataFile) -> int:
        """Return the number of pages of the file."""
        return len(self._places[file][0])

    def grow(self, file: MetadataFile, size: int) -> None:
        """Make room for at least ``size`` bytes; new bytes are zeros. Raises NoSpace; then nothing
        changed.
        """
        for _ in self.grow_in_pieces(file, size):
            pass

    def grow_in_pieces(self, file: MetadataFile, size: int) -> Iterator[None]:
        """Run :meth:`grow`, and yield after each allocation and each _SEALED_AT_ONCE pages. Until the end no
        superblock names the new blocks: after a crash the blocks are free and zeroed.
        """
        if DIV_ROUND_UP(size, PAYLOAD) <= self.pages(file):
            return iter(())
        for _ in self._growth:  # an earlier growth ends first
            pass
        self._growth = self._grow(file, size)
        return self._growth

    def _grow(self, file: MetadataFile, size: int) -> Iterator[None]:
        had = self.pages(file)
        more = DIV_ROUND_UP(size, PAYLOAD) - had
        taken: list[tuple[Block, Range]] = []
        try:
            for replica in range(REPLICAS):
                at = _base(file, replica) + had
                for run in self._allocator.allocate_for(self._extents, [Range(at, at + more)]):
                    self._extents.insert(at, run.start, run.length)
                    taken.append((at, run))
                    at += run.length
                yield
        except NoSpace:
            for at, run in taken:
                self._extents.remove(at, at + run.length)
                self._allocator.free(run)
            raise
        for first in range(had, had + more, _SEALED_AT_ONCE):
            self._seal_new(file, first, min(first + _SEALED_AT_ONCE, had + more))
            yield
        if self._is_published:
            self._publish()

    def _publish(self) -> None:
        """Have the superblocks name the present runs of the files."""
        self.superblocks.write(
            [(e.file_block, e.dev_block, e.length) for e in self._extents if e.file_block >> 40]
        )

    def _seal_new(self, file: MetadataFile, first: Block, end: Block) -> None:
        self._place(file, first, end)
        self._page_generation += 1
        blocks = memoryview(bytearray((end - first) * PAGE_SIZE))
        for number in range(first, end):
            at = (number - first) * PAGE_SIZE
            seal(blocks[at : at + PAGE_SIZE], file, number, self._page_generation)
        for replica in range(REPLICAS):
            self._store(file, replica, first, blocks)

    def read(self, file: MetadataFile, offset: int, length: int) -> bytes:
        """Return the bytes ``[offset, offset + length)``. Raises MediaError if both copies of a page are
        bad.
        """
        parts = [self._good(file, page)[start:end] for page, start, end in pages_of(offset, length)]
        return b"".join(parts)

    def _good(self, file: MetadataFile, page: Block) -> memoryview:
        """Return the whole page from a good copy. A bad copy is rewritten."""
        agreed = self._agreed(file, page)
        return agreed if agreed is not None else self._good_of_two(file, page)

    def _agreed(self, file: MetadataFile, page: Block) -> memoryview | None:
        """Return the whole page if both copies are readable, equal and intact; else None."""
        first, second = self._places[file]
        try:
            one = self._dax.direct_access(first[page], PAGE_SIZE)
            other = self._dax.direct_access(second[page], PAGE_SIZE)
        except MediaError:
            return None
        # The comparison is of bytes: a comparison of memoryviews takes a hundred times as long.
        return one if bytes(one) == bytes(other) and is_intact(one, file, page) else None

    def _good_of_two(self, file: MetadataFile, page: Block) -> memoryview:
        copies = self._copies(file, page)
        good = next((copy for copy in copies if copy.state is CopyState.GOOD), None)
        if good is None:
            why = ", ".join(f"copy {number} {copy.state}" for number, copy in enumerate(copies, 1))
            name = f"metadata page {page} of {file.name.lower()}"
            raise MediaError(f"{self._dax.name}: both copies of {name} are lost: {why}")
        data = self._dax.direct_access(good.offset, PAGE_SIZE)
        for number, copy in enumerate(copies, 1):
            # A poisoned copy stays until fsck or the next write: a write of a whole page clears poison.
            if copy.state in (CopyState.CORRUPT, CopyState.STALE) and not self.is_read_only:
                self._dax.direct_access(copy.offset, PAGE_SIZE)[:] = data
                self._on_rewrite(file.name.lower(), page, number, copy.state)
        return data

    def _copies(self, file: MetadataFile, page: Block) -> list[Copy]:
        """Return both copies of a page, with states from a check of all bytes."""
        found: list[Copy] = []
        for places in self._places[file]:
            state, generation = CopyState.POISONED, 0
            if not self._dax.is_poisoned(places[page], PAGE_SIZE):
                data = self._dax.direct_access(places[page], PAGE_SIZE)
                state = CopyState.GOOD if is_intact(data, file, page) else CopyState.CORRUPT
                generation = generation_of(data) if state is CopyState.GOOD else 0
            found.append(Copy(places[page], generation, state))
        newest = max(copy.generation for copy in found)
        return [
            Copy(copy.offset, copy.generation, CopyState.STALE)
            if copy.state is CopyState.GOOD and copy.generation < newest
            else copy
            for copy in found
        ]

    def write(self, file: MetadataFile, offset: int, data: bytes | memoryview) -> None:
        """Store ``data`` in both replicas, one after the other. Precondition: the file has room.

        Raises MediaError if a page is written in part and both copies of the rest are bad.
        """
        if not data:
            return
        view = memoryview(data)
        first, at = divmod(offset, PAYLOAD)
        count = DIV_ROUND_UP(at + len(view), PAYLOAD)
        blocks = memoryview(bytearray(count * PAGE_SIZE))
        if at:
            blocks[:PAGE_SIZE] = self._good_to_write(file, first)
        if (at + len(view)) % PAYLOAD and (count > 1 or not at):
            blocks[-PAGE_SIZE:] = self._good_to_write(file, first + count - 1)
        self._page_generation += 1
        done = 0
        for page in range(first, first + count):
            block = blocks[(page - first) * PAGE_SIZE :][:PAGE_SIZE]
            part = view[done : done + PAYLOAD - at]
            block[at : at + len(part)] = part
            seal(block, file, page, self._page_generation)
            done, at = done + len(part), 0
        self._last_written = (file, first + count - 1, blocks[-PAGE_SIZE:])
        if self._dax.has_poison and any(self._is_poisoned(file, r, first, count) for r in range(REPLICAS)):
            self._write_over_poison(file, first, blocks)
        else:
            for replica in range(REPLICAS):
                self._store(file, replica, first, blocks)

    def _good_to_write(self, file: MetadataFile, page: Block) -> memoryview:
        """Return the whole page for a write of a part. The page written last is not read and checked again:
        the log grows within a page, and a read would take a third of a small commit.
        """
        last_file, last_page, block = self._last_written
        if (file, page) == (last_file, last_page) and not self._dax.has_poison:
            return block
        return self._good(file, page)

    def _is_poisoned(self, file: MetadataFile, replica: int, first: Block, count: int) -> bool:
        runs = self._runs(file, replica, first, count)
        return any(self._dax.is_poisoned(start, length) for start, length in runs)

    def _runs(self, file: MetadataFile, replica: int, first: Block, count: int) -> Iterator[tuple[int, int]]:
        """Yield the device offset and length in bytes of each run of ``count`` pages."""
        places, ends = self._places[file][replica], self._ends[file][replica]
        left = count * PAGE_SIZE
        while left:
            start = places[first]
            length = min(left, ends[first] - start)
            yield start, length
            first += length // PAGE_SIZE
            left -= length

    def _write_over_poison(self, file: MetadataFile, first: Block, blocks: memoryview) -> None:
        """Write page by page, the poisoned copy first. The other copy is whole until the write of the first
        copy is complete.
        """
        for index in range(len(blocks) // PAGE_SIZE):
            block = blocks[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]
            poisoned = [self._is_poisoned(file, replica, first + index, 1) for replica in range(REPLICAS)]
            for replica in sorted(range(REPLICAS), key=lambda replica: not poisoned[replica]):
                self._store(file, replica, first + index, block)

    def _store(self, file: MetadataFile, replica: int, first: Block, blocks: memoryview) -> None:
        """Write sealed pages to the media, from page ``first`` of one replica on. The write clears poison."""
        done = 0
        for start, length in self._runs(file, replica, first, len(blocks) // PAGE_SIZE):
            self._put(start, blocks[done : done + length])
            done += length

    def _put(self, offset: int, data: memoryview) -> None:
        try:
            self._dax.direct_access(offset, len(data))[:] = data
        except MediaError:
            self._dax.recovery_write(offset, data)

    def _device_offset(self, file: MetadataFile, replica: int, page: Block) -> int:
        return self._places[file][replica][page]

    # -- repair

    def damaged_pages(self, *, is_clean: bool) -> list[MetadataDamage]:
        """Compare all copies. After a crash (not ``is_clean``), a write may have reached one copy only; a
        single bad copy without poison is then left to :meth:`settle`, and does not count as damage.
        """
        found = self.superblocks.damaged(is_clean=is_clean)
        for file, page, copies in self._damaged():
            unusable = [
                (n, copy.state) for n, copy in enumerate(copies, 1) if copy.state is not CopyState.GOOD
            ]
            name = f"metadata page {page} of {file.name.lower()}"
            if all(state is CopyState.POISONED for _, state in unusable):
                lost = "both copies are lost" if len(unusable) == REPLICAS else "one copy is lost"
                found.append(MetadataDamage(f"{name} is poisoned: {lost}", len(unusable) < REPLICAS))
            elif len(unusable) == REPLICAS:
                why = ", ".join(f"copy {number} {state}" for number, state in unusable)
                found.append(MetadataDamage(f"{name}: both copies are lost: {why}", is_repairable=False))
            elif is_clean:
                found.append(
                    MetadataDamage(f"{name}: copy {unusable[0][0]} {unusable[0][1]}", is_repairable=True)
                )
        return found

    def _damaged(self) -> Iterator[tuple[MetadataFile, Block, list[Copy]]]:
        for file in MetadataFile:
            for page in range(self.pages(file)):
                if self._agreed(file, page) is not None:
                    continue
                copies = self._copies(file, page)
                if any(copy.state is not CopyState.GOOD for copy in copies):
                    yield file, page, copies

    def repair(self) -> int:
        """Rewrite each bad copy from the good copy. Return the number of rewritten copies."""
        rewritten = 0
        for _, _, copies in self._damaged():
            good = next((copy for copy in copies if copy.state is CopyState.GOOD), None)
            for copy in copies if good is not None else ():
                if copy.state is not CopyState.GOOD and good is not None:
                    self._put(copy.offset, self._dax.direct_access(good.offset, PAGE_SIZE))
                    rewritten += 1
        freed, stale = self.superblocks.clear_poison(), self.superblocks.unusable()
        if stale:
            self._publish()
        return rewritten + max(freed, stale)

    def settle(self) -> None:
        """Make both copies of each page equal, after a crash. A write before the crash may have reached one
        copy only.
        """
        for file, page, copies in self._damaged():
            if any(copy.state is CopyState.GOOD for copy in copies):
                self._good_of_two(file, page)
