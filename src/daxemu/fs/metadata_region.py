"""Where the filesystem's own records live on the device: two superblocks, and two files of blocks, each kept
twice.

    first 16 blocks     superblock: where everything below is, generation, checksum
    16 in the middle    the same again
    anywhere            "db" and "wal", which fs/metadata_vfs.py gives to SQLite; each has two replicas of its
    blocks

All of it belongs to ``METADATA_INO`` in the reverse map, like the extents of any file, so that poison there
is found as metadata. Each page of each replica is sealed (fs/metadata_page.py). A page that is poisoned,
corrupt or stale is read from the other replica. A read rewrites a corrupt or stale copy, a write both copies.

Invariants:
- Both replicas of a file are equally long, and every page of a file has been sealed.
- A write is complete in one replica before the other is touched: a torn write leaves one copy of each page.
- A page's generation grows with each write, across mounts too: its upper half is the superblock's generation.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator
from enum import IntEnum

import msgspec

from daxemu.errors import CorruptMetadata, DaxemuError, MediaError, NoSpace
from daxemu.fs.allocator import Allocator
from daxemu.fs.extents import ExtentMap
from daxemu.fs.metadata_page import PAYLOAD, Copy, CopyState, generation_of, is_intact, seal, trailer_of
from daxemu.fs.rmap import METADATA_INO, Rmap
from daxemu.pmem.dax_device import DaxDevice
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE, Block

MAGIC = "daxemu-fs"
VERSION = 3
SUPER_BLOCKS = 16
REPLICAS = 2
_HEADER = 20  # bytes of a superblock before its record: length and checksum
_SEALED_AT_ONCE = 256  # pages of a new extent that one store seals


class MetadataFile(IntEnum):
    """The two files."""

    DB = 0
    WAL = 1


class Superblock(msgspec.Struct, array_like=True):
    """``runs``: (file block, device block, blocks) of every extent of METADATA_INO but the superblocks
    themselves.
    """

    magic: str
    version: int
    generation: int
    total_blocks: int
    runs: list[tuple[int, int, int]]


class Damage(msgspec.Struct, frozen=True):
    """One line about a bad page or superblock. ``mendable``: the other copy is good, a repair uses it."""

    line: str
    mendable: bool


OnBadCopy = Callable[[str, int, int, CopyState], None]
"""Called with a file's name, a page of it, the copy (1 or 2) and its state, when a bad copy was rewritten."""


def _base(file: MetadataFile, replica: int) -> Block:
    """The file block of METADATA_INO at which a replica begins."""
    return (1 + file * REPLICAS + replica) << 40


def _checksum(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


class MetadataRegion:
    """The blocks of METADATA_INO. Sizes and offsets inside a file are bytes."""

    def __init__(self, dax: DaxDevice, rmap: Rmap, allocator: Allocator) -> None:
        """Claim the superblocks' own blocks. The caller then calls :meth:`format` or :meth:`load`."""
        self._dax = dax
        self._allocator = allocator
        self._rmap = rmap
        self._extents = ExtentMap(METADATA_INO, rmap)
        self._places = [[array("Q") for _ in range(REPLICAS)] for _ in MetadataFile]
        self._generation = self._page_generation = 0
        self._is_published = True
        self.is_read_only = False
        """Whether reads leave a bad copy as it is."""
        self.on_bad_copy: OnBadCopy = lambda file, page, copy, state: None
        total = allocator.total
        self._super_blocks = (Range(0, SUPER_BLOCKS), Range(total // 2, total // 2 + SUPER_BLOCKS))
        for index, blocks in enumerate(self._super_blocks):
            allocator.take(blocks)
            self._extents.insert(index * SUPER_BLOCKS, blocks.start, blocks.length)
            dax.reserve(blocks.start * PAGE_SIZE, blocks.length * PAGE_SIZE)

    # -- the superblocks

    def is_formatted(self) -> bool:
        """Whether there is a filesystem; poison where a superblock should be counts as one, lest it be
        overwritten.
        """
        for blocks in self._super_blocks:
            offset = blocks.start * PAGE_SIZE
            if self._dax.is_poisoned(offset, PAGE_SIZE) or any(self._dax.direct_access(offset, PAGE_SIZE)):
                return True
        return False

    def prepare(self) -> None:
        """Begin a new filesystem that no superblock names before :meth:`format`: a crash leaves none."""
        self._is_published = False

    def format(self) -> None:
        """Write the superblocks of a new filesystem, with the files that it has by now."""
        self._allocator.discard_free()  # what a first mount that was killed has left
        self._is_published = True
        self._write_superblocks()
        self._page_generation = self._generation << 32

    def load(self) -> None:
        """Claim the blocks that the newest readable superblock names. Raises CorruptMetadata."""
        newest = self._read_superblock()
        self._generation = newest.generation
        self._page_generation = newest.generation << 32
        for file_block, dev_block, length in newest.runs:
            self._claim(file_block, Range(dev_block, dev_block + length))
        for file in MetadataFile:
            sizes = {self._length(_base(file, replica)) for replica in range(REPLICAS)}
            if len(sizes) != 1:
                raise CorruptMetadata(f"{self._dax.name}: the superblock's replicas differ in size")
            self._place(file, 0, sizes.pop())

    def begin(self) -> None:
        """Begin a mount that writes: rewrite the superblocks, with a generation above that of any page."""
        for copy, (blocks, state) in enumerate(
            zip(self._super_blocks, self._superblock_states(), strict=True)
        ):
            if state in (CopyState.CORRUPT, CopyState.STALE):
                self.on_bad_copy("superblock", blocks.start, copy + 1, state)
        self._write_superblocks()
        self._page_generation = self._generation << 32

    def _place(self, file: MetadataFile, first: Block, end: Block) -> None:
        """Note where the pages ``[first, end)`` are. Precondition: they are mapped."""
        for replica, places in enumerate(self._places[file]):
            base = _base(file, replica)
            for run in self._extents.runs(base + first, base + end):
                start = run.dev_block * PAGE_SIZE
                places.extend(range(start, start + run.length * PAGE_SIZE, PAGE_SIZE))

    def _claim(self, file_block: Block, run: Range) -> None:
        if not run or run.start < 0 or run.end > self._allocator.total or not 1 <= file_block >> 40 <= 4:
            raise CorruptMetadata(f"{self._dax.name}: the superblock names blocks outside the device")
        if any(there.link is not None for there in self._extents.runs(file_block, file_block + run.length)):
            raise CorruptMetadata(f"{self._dax.name}: the superblock's runs overlap")
        try:
            self._allocator.take(run)
        except NoSpace as error:
            raise CorruptMetadata(f"{self._dax.name}: the superblock names blocks twice") from error
        self._dax.reserve(run.start * PAGE_SIZE, run.length * PAGE_SIZE)
        self._extents.insert(file_block, run.start, run.length)

    def _length(self, base: Block) -> int:
        """How many blocks of a replica are mapped. Raises CorruptMetadata for one with a hole."""
        runs = self._extents.lookup(base, base + (1 << 40))
        if any(run.link is None for run in runs[:-1]):
            raise CorruptMetadata(f"{self._dax.name}: a replica has a hole")
        return sum(run.length for run in runs if run.link is not None)

    def _read_superblock(self) -> Superblock:
        found: list[Superblock] = []
        why: list[str] = []
        for name, blocks in zip(("first", "second"), self._super_blocks, strict=True):
            try:
                found.append(self._unseal(blocks))
            except MediaError:
                why.append(f"the {name} is poisoned")
            except (CorruptMetadata, msgspec.MsgspecError):
                why.append(f"the {name} has a wrong checksum")
        if not found:
            raise CorruptMetadata(f"{self._dax.name}: neither superblock can be read ({', '.join(why)})")
        newest = max(found, key=lambda superblock: superblock.generation)
        if newest.magic != MAGIC or newest.version != VERSION:
            raise CorruptMetadata(
                f"{self._dax.name}: the filesystem has format {newest.version}, this daxemu reads {VERSION}: "
                "copy its files off with the daxemu that made it, then mkfs --force"
            )
        if newest.total_blocks != self._allocator.total:
            raise CorruptMetadata(f"{self._dax.name}: the filesystem was made on a device of another size")
        if not 0 < newest.generation < 1 << 31:
            raise CorruptMetadata(f"{self._dax.name}: the superblock's generation is {newest.generation}")
        return newest

    def _unseal(self, blocks: Range) -> Superblock:
        head = self._dax.direct_access(blocks.start * PAGE_SIZE, PAGE_SIZE)
        length = int.from_bytes(head[:4], "little")
        if not 0 < length <= SUPER_BLOCKS * PAGE_SIZE - _HEADER:
            raise CorruptMetadata("a superblock has no sensible length")
        whole = self._dax.direct_access(blocks.start * PAGE_SIZE, _HEADER + length)
        if _checksum(whole[_HEADER:]) != bytes(whole[4:_HEADER]):
            raise CorruptMetadata("a superblock does not match its checksum")
        try:
            return msgspec.msgpack.decode(whole[_HEADER:], type=Superblock)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise CorruptMetadata("a superblock's record cannot be decoded") from error

    def _write_superblocks(self) -> None:
        self._generation += 1
        runs = [(e.file_block, e.dev_block, e.length) for e in self._extents if e.file_block >> 40]
        superblock = Superblock(MAGIC, VERSION, self._generation, self._allocator.total, runs)
        record = msgspec.msgpack.encode(superblock)
        if len(record) > SUPER_BLOCKS * PAGE_SIZE - _HEADER:
            raise NoSpace("the metadata is in too many pieces for the superblock")
        sealed = len(record).to_bytes(4, "little") + _checksum(record) + record
        sealed += bytes(-len(sealed) % PAGE_SIZE)
        # A copy that is poisoned stays so, for fsck to find, as long as the other is good.
        offsets = [blocks.start * PAGE_SIZE for blocks in self._super_blocks]
        good = [at for at in offsets if not self._dax.is_poisoned(at, len(sealed))]
        for offset in good or offsets:
            self._dax.recovery_write(offset, sealed)

    # -- the files

    def size(self, file: MetadataFile) -> int:
        """Bytes the file has room for."""
        return self.pages(file) * PAYLOAD

    def pages(self, file: MetadataFile) -> int:
        """Pages of the file."""
        return len(self._places[file][0])

    def grow(self, file: MetadataFile, size: int) -> None:
        """Make room for at least ``size`` bytes; new ones are zeros. Raises NoSpace; then nothing changed."""
        had = self.pages(file)
        more = -(-size // PAYLOAD) - had
        if more <= 0:
            return
        taken: list[list[Range]] = []
        try:
            for replica in range(REPLICAS):
                at = _base(file, replica) + had
                taken.append(self._allocator.allocate_for(self._extents, [Range(at, at + more)]))
            for replica, runs in enumerate(taken):
                at = _base(file, replica) + had
                for run in runs:
                    self._extents.insert(at, run.start, run.length)
                    at += run.length
            self._place(file, had, had + more)
            # Sealed while no superblock names these blocks: after a crash they are free, and made zero.
            if not self._is_published:
                self._check_unused(file, had, had + more)
            self._seal_new(file, had, had + more)
            if self._is_published:
                self._write_superblocks()
        except NoSpace:
            for replica in range(REPLICAS):
                del self._places[file][replica][had:]
                start = _base(file, replica) + had
                self._extents.remove(start, start + more)
            for run in (run for runs in taken for run in runs):
                self._allocator.free(run)
            raise

    def _check_unused(self, file: MetadataFile, first: Block, end: Block) -> None:
        """Raises CorruptMetadata where a new filesystem would overwrite pages of one that was in use: their
        generation is of a published superblock.
        """
        for page in range(first, end):
            for copy in self._copies(file, page):
                if copy.generation >> 32:
                    raise CorruptMetadata(
                        f"{self._dax.name}: both superblocks are zeros, but the device holds a filesystem's "
                        "metadata: restore a superblock, or mkfs --force"
                    )

    def _seal_new(self, file: MetadataFile, first: Block, end: Block) -> None:
        self._page_generation += 1
        for start in range(first, end, _SEALED_AT_ONCE):
            count = min(_SEALED_AT_ONCE, end - start)
            blocks = memoryview(bytearray(count * PAGE_SIZE))
            for number in range(count):
                page = blocks[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]
                seal(page, file, start + number, self._page_generation)
            for replica in range(REPLICAS):
                self._store(file, replica, start, blocks)

    def read(self, file: MetadataFile, offset: int, length: int) -> bytes:
        """The bytes ``[offset, offset + length)``. Raises MediaError where both copies of a page are bad."""
        parts = [self._good(file, page)[start:end] for page, start, end in _pages(offset, length)]
        return b"".join(parts)

    def _good(self, file: MetadataFile, page: Block) -> memoryview:
        """The whole page, of the copy that is right. A copy that is not is rewritten."""
        try:
            first, second = (
                self._dax.direct_access(places[page], PAGE_SIZE) for places in self._places[file]
            )
        except MediaError:
            return self._good_of_two(file, page)
        if (
            trailer_of(first) == trailer_of(second)
            and is_intact(first, file, page)
            and is_intact(second, file, page)
        ):
            return first
        return self._good_of_two(file, page)

    def _good_of_two(self, file: MetadataFile, page: Block) -> memoryview:
        copies = self._copies(file, page)
        good = next((copy for copy in copies if copy.state is CopyState.GOOD), None)
        if good is None:
            why = ", ".join(f"copy {number} {copy.state}" for number, copy in enumerate(copies, 1))
            name = f"metadata page {page} of {file.name.lower()}"
            raise MediaError(f"{self._dax.name}: both copies of {name} are lost: {why}")
        data = self._dax.direct_access(good.offset, PAGE_SIZE)
        for number, copy in enumerate(copies, 1):
            # A poisoned copy stays until fsck or the next write, which is a store that clears poison.
            if copy.state in (CopyState.CORRUPT, CopyState.STALE) and not self.is_read_only:
                self._dax.direct_access(copy.offset, PAGE_SIZE)[:] = data
                self.on_bad_copy(file.name.lower(), page, number, copy.state)
        return data

    def _copies(self, file: MetadataFile, page: Block) -> list[Copy]:
        """Both copies of a page, all bytes looked at."""
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
        view, done = memoryview(data), 0
        pages = _pages(offset, len(view))
        blocks = memoryview(bytearray(len(pages) * PAGE_SIZE))
        self._page_generation += 1
        for index, (page, start, end) in enumerate(pages):
            block = blocks[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]
            if end - start < PAYLOAD:
                block[:] = self._good(file, page)
            block[start:end] = view[done : done + end - start]
            done += end - start
            seal(block, file, page, self._page_generation)
        first = pages[0][0]
        if any(self._is_poisoned(file, replica, first, len(pages)) for replica in range(REPLICAS)):
            self._write_over_poison(file, first, blocks)
            return
        for replica in range(REPLICAS):
            self._store(file, replica, first, blocks)

    def _is_poisoned(self, file: MetadataFile, replica: int, first: Block, count: int) -> bool:
        base = _base(file, replica) + first
        runs = self._extents.runs(base, base + count)
        return any(self._dax.is_poisoned(run.dev_block * PAGE_SIZE, run.length * PAGE_SIZE) for run in runs)

    def _write_over_poison(self, file: MetadataFile, first: Block, blocks: memoryview) -> None:
        """Write page by page, a poisoned copy first: the other is whole until that one is."""
        for index in range(len(blocks) // PAGE_SIZE):
            block = blocks[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]
            bad = [self._is_poisoned(file, replica, first + index, 1) for replica in range(REPLICAS)]
            for replica in sorted(range(REPLICAS), key=lambda replica: not bad[replica]):
                self._store(file, replica, first + index, block)

    def _store(self, file: MetadataFile, replica: int, first: Block, blocks: memoryview) -> None:
        """Put sealed pages on the media, from page ``first`` of one replica on; clears poison there."""
        base, done = _base(file, replica) + first, 0
        for run in self._extents.runs(base, base + len(blocks) // PAGE_SIZE):
            length = run.length * PAGE_SIZE
            self._put(run.dev_block * PAGE_SIZE, blocks[done : done + length])
            done += length

    def _put(self, offset: int, data: memoryview) -> None:
        if self._dax.is_poisoned(offset, len(data)):
            self._dax.recovery_write(offset, data)
        else:
            self._dax.direct_access(offset, len(data))[:] = data

    def _device_offset(self, file: MetadataFile, replica: int, page: Block) -> int:
        return self._places[file][replica][page]

    # -- repair

    def damaged_pages(self, *, is_clean: bool) -> list[Damage]:
        """Compare all copies. Unless the last end ``is_clean``, a write may have reached one copy only: a
        single bad copy that is not poisoned is then left to :meth:`settle`, and is no damage.
        """
        found = self.damaged_superblocks(is_clean=is_clean)
        for file, page, copies in self._damaged():
            bad = [(n, copy.state) for n, copy in enumerate(copies, 1) if copy.state is not CopyState.GOOD]
            name = f"metadata page {page} of {file.name.lower()}"
            if all(state is CopyState.POISONED for _, state in bad):
                lost = "both copies are lost" if len(bad) == REPLICAS else "one copy is lost"
                found.append(Damage(f"{name} is poisoned: {lost}", len(bad) < REPLICAS))
            elif len(bad) == REPLICAS:
                why = ", ".join(f"copy {number} {state}" for number, state in bad)
                found.append(Damage(f"{name}: both copies are lost: {why}", mendable=False))
            elif is_clean:
                found.append(Damage(f"{name}: copy {bad[0][0]} {bad[0][1]}", mendable=True))
        return found

    def damaged_superblocks(self, *, is_clean: bool) -> list[Damage]:
        """What is wrong with either superblock."""
        states = self._superblock_states()
        mendable = CopyState.GOOD in states
        return [
            Damage(f"the {name} superblock {state}", mendable)
            for name, state in zip(("first", "second"), states, strict=True)
            if state is CopyState.POISONED or (state is not CopyState.GOOD and (is_clean or not mendable))
        ]

    def _superblock_states(self) -> list[CopyState]:
        """As of the generation that :meth:`load` found; without it, none is GOOD."""
        states = []
        for blocks in self._super_blocks:
            if self._dax.is_poisoned(blocks.start * PAGE_SIZE, blocks.length * PAGE_SIZE):
                states.append(CopyState.POISONED)
                continue
            try:
                is_current = self._unseal(blocks).generation == self._generation
                states.append(CopyState.GOOD if is_current else CopyState.STALE)
            except (DaxemuError, msgspec.MsgspecError):
                states.append(CopyState.CORRUPT)
        return states

    def _damaged(self) -> Iterator[tuple[MetadataFile, Block, list[Copy]]]:
        for file in MetadataFile:
            for page in range(self.pages(file)):
                copies = self._copies(file, page)
                if any(copy.state is not CopyState.GOOD for copy in copies):
                    yield file, page, copies

    def repair(self) -> int:
        """Rewrite every bad copy from the good one. Returns how many copies were rewritten."""
        healed = 0
        for _, _, copies in self._damaged():
            good = next((copy for copy in copies if copy.state is CopyState.GOOD), None)
            for copy in copies if good is not None else ():
                if copy.state is not CopyState.GOOD and good is not None:
                    self._put(copy.offset, self._dax.direct_access(good.offset, PAGE_SIZE))
                    healed += 1
        return healed + self._repair_superblocks()

    def _repair_superblocks(self) -> int:
        healed = 0
        for blocks in self._super_blocks:
            for part in self._dax.poisoned(blocks.start * PAGE_SIZE, blocks.length * PAGE_SIZE):
                first = part.start // PAGE_SIZE * PAGE_SIZE
                last = min(-(-part.end // PAGE_SIZE), blocks.end) * PAGE_SIZE
                self._dax.recovery_write(max(first, blocks.start * PAGE_SIZE), bytes(last - first))
                healed += (last - first) // PAGE_SIZE
        stale = sum(state is not CopyState.GOOD for state in self._superblock_states())
        if stale:
            self._write_superblocks()
        return max(healed, stale)

    def settle(self) -> None:
        """After a crash, a write may have reached one copy only: make both copies of each page equal."""
        for file, page, copies in self._damaged():
            if any(copy.state is CopyState.GOOD for copy in copies):
                self._good_of_two(file, page)


def _pages(offset: int, length: int) -> list[tuple[Block, int, int]]:
    """(page, start in it, end in it) of each page that holds a part of the range."""
    end = offset + length
    return [
        (page, max(offset - page * PAYLOAD, 0), min(end - page * PAYLOAD, PAYLOAD))
        for page in range(offset // PAYLOAD, -(-end // PAYLOAD))
    ]
