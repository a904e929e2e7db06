"""Where the filesystem's own records live on the device: two superblocks, and two files of blocks, each kept
twice.

    first 16 blocks     superblock: where everything below is, generation, checksum
    16 in the middle    the same again
    anywhere            "db" and "wal", which fs/metadata_vfs.py gives to SQLite; each has two replicas of its
    blocks

All of it belongs to ``METADATA_INO`` in the reverse map, like the extents of any file, so that poison there
is found as metadata. A page that cannot be read is read from the other replica; a write heals it.

Invariant: a block is named by a superblock before anything is written to it, and both replicas of a file are
equally long.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from enum import IntEnum

import msgspec

from daxemu.errors import CorruptMetadata, DaxemuError, MediaError, NoSpace
from daxemu.fs.allocator import Allocator
from daxemu.fs.extents import ExtentMap, Mapping
from daxemu.fs.rmap import METADATA_INO, Rmap
from daxemu.pmem.dax_device import DaxDevice
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE, Block

MAGIC = "daxemu-fs"
VERSION = 2
SUPER_BLOCKS = 16
REPLICAS = 2
_HEADER = 20  # bytes of a superblock before its record: length and checksum


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


def _base(file: MetadataFile, replica: int) -> Block:
    """The file block of METADATA_INO at which a replica begins."""
    return (1 + file * REPLICAS + replica) << 40


def _checksum(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


class MetadataRegion:
    """The blocks of METADATA_INO. Sizes and offsets inside a file are bytes."""

    def __init__(self, dax: DaxDevice, rmap: Rmap, allocator: Allocator) -> None:
        """Claims the superblocks' own blocks; then either :meth:`format` or :meth:`load`."""
        self._dax = dax
        self._allocator = allocator
        self._rmap = rmap
        self._extents = ExtentMap(METADATA_INO, rmap)
        self._blocks = [0, 0]
        self._generation = 0
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

    def format(self) -> None:
        """Begin a new filesystem: no files yet."""
        self._write_superblocks()

    def load(self) -> None:
        """Claim the blocks that the newest readable superblock names. Raises CorruptMetadata."""
        newest = self._read_superblock()
        self._generation = newest.generation
        for file_block, dev_block, length in newest.runs:
            self._claim(file_block, Range(dev_block, dev_block + length))
        for file in MetadataFile:
            sizes = {self._length(_base(file, replica)) for replica in range(REPLICAS)}
            if len(sizes) != 1:
                raise CorruptMetadata(f"{self._dax.name}: the superblock's replicas differ in size")
            self._blocks[file] = sizes.pop()

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
        why = "it is all zeros"
        for blocks in self._super_blocks:
            try:
                found.append(self._unseal(blocks))
            except (DaxemuError, msgspec.MsgspecError) as error:
                why = str(error)
        if not found:
            raise CorruptMetadata(f"{self._dax.name}: neither superblock can be read ({why})")
        newest = max(found, key=lambda superblock: superblock.generation)
        if newest.magic != MAGIC or newest.version != VERSION:
            raise CorruptMetadata(
                f"{self._dax.name}: a filesystem of version {newest.version}, not {VERSION}"
            )
        if newest.total_blocks != self._allocator.total:
            raise CorruptMetadata(f"{self._dax.name}: the filesystem was made on a device of another size")
        return newest

    def _unseal(self, blocks: Range) -> Superblock:
        head = self._dax.direct_access(blocks.start * PAGE_SIZE, PAGE_SIZE)
        length = int.from_bytes(head[:4], "little")
        if not 0 < length <= SUPER_BLOCKS * PAGE_SIZE - _HEADER:
            raise CorruptMetadata("a superblock has no sensible length")
        whole = self._dax.direct_access(blocks.start * PAGE_SIZE, _HEADER + length)
        if _checksum(whole[_HEADER:]) != bytes(whole[4:_HEADER]):
            raise CorruptMetadata("a superblock does not match its checksum")
        return msgspec.msgpack.decode(whole[_HEADER:], type=Superblock)

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
        return self._blocks[file] * PAGE_SIZE

    def grow(self, file: MetadataFile, size: int) -> None:
        """Make room for at least ``size`` bytes. Raises NoSpace; then it is as it was."""
        more = -(-size // PAGE_SIZE) - self._blocks[file]
        if more <= 0:
            return
        taken: list[list[Range]] = []
        try:
            for _ in range(REPLICAS):
                taken.append(self._allocator.allocate(more))
            for replica, runs in enumerate(taken):
                at = _base(file, replica) + self._blocks[file]
                for run in runs:
                    self._extents.insert(at, run.start, run.length)
                    at += run.length
            self._write_superblocks()
        except NoSpace:
            for replica in range(REPLICAS):
                start = _base(file, replica) + self._blocks[file]
                self._extents.remove(start, start + more)
            for run in (run for runs in taken for run in runs):
                self._allocator.free(run)
            raise
        self._blocks[file] += more

    def read(self, file: MetadataFile, offset: int, length: int) -> bytes:
        """The bytes ``[offset, offset + length)``. Raises MediaError where both replicas are poison."""
        parts = [self._read_page(file, page, start, end) for page, start, end in _pages(offset, length)]
        return b"".join(parts)

    def _read_page(self, file: MetadataFile, page: Block, start: int, end: int) -> bytes:
        for replica in range(REPLICAS):
            at = self._device_offset(file, replica, page)
            if not self._dax.is_poisoned(at, PAGE_SIZE):
                return bytes(self._dax.direct_access(at, PAGE_SIZE)[start:end])
        raise MediaError(f"{self._dax.name}: both copies of a metadata page are poison")

    def write(self, file: MetadataFile, offset: int, data: bytes | memoryview) -> None:
        """Store ``data`` in both replicas. Precondition: there is room. Heals a poisoned page as long as the
        other replica has what the write leaves of it.
        """
        first, last = offset // PAGE_SIZE, -(-(offset + len(data)) // PAGE_SIZE)
        copies = [
            self._extents.lookup(_base(file, r) + first, _base(file, r) + last) for r in range(REPLICAS)
        ]
        if any(self._dax.is_poisoned(*_bytes(run)) for runs in copies for run in runs):
            self._write_over_poison(file, offset, data)
            return
        view = memoryview(data)
        for runs in copies:
            done, at = 0, offset - first * PAGE_SIZE
            for run in runs:
                start, length = _bytes(run)
                part = view[done : done + length - at]
                self._dax.direct_access(start + at, len(part))[:] = part
                done, at = done + len(part), 0

    def _write_over_poison(self, file: MetadataFile, offset: int, data: bytes | memoryview) -> None:
        done = 0
        for page, start, end in _pages(offset, len(data)):
            piece = data[done : done + end - start]
            done += end - start
            bad = any(
                self._dax.is_poisoned(self._device_offset(file, r, page), PAGE_SIZE) for r in range(REPLICAS)
            )
            if bad and end - start < PAGE_SIZE:
                whole = bytearray(self._read_page(file, page, 0, PAGE_SIZE))
                whole[start:end] = piece
                piece, start, end = bytes(whole), 0, PAGE_SIZE
            for replica in range(REPLICAS):
                at = self._device_offset(file, replica, page)
                if bad:
                    self._dax.recovery_write(at, piece)
                else:
                    self._dax.direct_access(at + start, end - start)[:] = piece

    def _device_offset(self, file: MetadataFile, replica: int, page: Block) -> int:
        (run,) = self._extents.runs(_base(file, replica) + page, _base(file, replica) + page + 1)
        return run.dev_block * PAGE_SIZE

    # -- repair

    def _poisoned_pages(self) -> Iterator[tuple[MetadataFile, Block, list[int]]]:
        """(file, page, device offsets of its poisoned copies) of every page with poison; found from the
        poison.
        """
        seen: set[tuple[int, Block]] = set()
        for part in self._dax.poisoned(0, self._dax.size):
            for owner in self._rmap.owners(part.start // PAGE_SIZE, -(-part.end // PAGE_SIZE)):
                if owner.ino != METADATA_INO or not owner.file_block >> 40:
                    continue
                file = MetadataFile(((owner.file_block >> 40) - 1) // REPLICAS)
                first = owner.file_block & ((1 << 40) - 1)
                for page in range(first, first + owner.length):
                    if (file, page) not in seen:
                        seen.add((file, page))
                        offsets = [self._device_offset(file, replica, page) for replica in range(REPLICAS)]
                        yield file, page, [at for at in offsets if self._dax.is_poisoned(at, PAGE_SIZE)]

    def damaged_pages(self, *, is_clean: bool) -> list[str]:
        """What is poisoned, and whether another copy has it; one line each. Where the last end was
        ``is_clean``, copies that are not the same are wrong, too; after a crash :meth:`settle` sees to them.
        """
        found = []
        for name, blocks in zip(("first", "second"), self._super_blocks, strict=True):
            if self._dax.is_poisoned(blocks.start * PAGE_SIZE, blocks.length * PAGE_SIZE):
                found.append(f"the {name} superblock is poisoned")
            elif is_clean and not self._is_current(blocks):
                found.append(f"the {name} superblock is damaged, or older than the other")
        for file, page, bad in self._poisoned_pages():
            lost = "both copies are lost" if len(bad) == REPLICAS else "one copy is lost"
            found.append(f"metadata page {page} of {file.name.lower()} is poisoned: {lost}")
        for file, page, _ in self._differing_pages() if is_clean else ():
            found.append(f"the copies of metadata page {page} of {file.name.lower()} differ")
        return found

    def repair(self) -> int:
        """Write every poisoned page anew from the other copy; returns how many pages were healed."""
        healed = 0
        for file, page, bad in list(self._poisoned_pages()):
            if len(bad) < REPLICAS:
                good = self._read_page(file, page, 0, PAGE_SIZE)
                for at in bad:
                    self._dax.recovery_write(at, good)
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
        stale = sum(not self._is_current(blocks) for blocks in self._super_blocks)
        if stale:
            self._write_superblocks()
        return max(healed, stale)

    def _is_current(self, blocks: Range) -> bool:
        """Whether a superblock can be read, and is of the generation that counts."""
        try:
            return self._unseal(blocks).generation == self._generation
        except (DaxemuError, msgspec.MsgspecError):
            return False

    def _differing_pages(self) -> Iterator[tuple[MetadataFile, Block, list[int]]]:
        """(file, page, device offsets of its copies) of each page whose copies can be read and differ."""
        for file in MetadataFile:
            for page in range(self._blocks[file]):
                offsets = [self._device_offset(file, replica, page) for replica in range(REPLICAS)]
                if any(self._dax.is_poisoned(at, PAGE_SIZE) for at in offsets):
                    continue
                first, *others = (bytes(self._dax.direct_access(at, PAGE_SIZE)) for at in offsets)
                if any(other != first for other in others):
                    yield file, page, offsets

    def settle(self) -> None:
        """After a crash: a write may have reached one copy only. The first is written first, and is what is
        read.
        """
        for _, _, offsets in list(self._differing_pages()):
            first = bytes(self._dax.direct_access(offsets[0], PAGE_SIZE))
            for at in offsets[1:]:
                self._dax.direct_access(at, PAGE_SIZE)[:] = first
        if not all(map(self._is_current, self._super_blocks)):
            self._write_superblocks()


def _bytes(run: Mapping) -> tuple[int, int]:
    """Where a run is on the device, and its length, in bytes."""
    return run.dev_block * PAGE_SIZE, run.length * PAGE_SIZE


def _pages(offset: int, length: int) -> list[tuple[Block, int, int]]:
    """(page, start in it, end in it) of each page that holds a part of the range."""
    end = offset + length
    return [
        (page, max(offset - page * PAGE_SIZE, 0), min(end - page * PAGE_SIZE, PAGE_SIZE))
        for page in range(offset // PAGE_SIZE, -(-end // PAGE_SIZE))
    ]
