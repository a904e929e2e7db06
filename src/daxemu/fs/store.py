"""The filesystem's own records, on the device itself.

The first blocks of the device are the metadata region, owned by ``METADATA_INO`` in the reverse map like any
other extent, so that poison there is found as metadata:

    block 0            superblock          names the slot that counts, its length and checksum
    blocks 1..n        slot A              } one snapshot of all inodes each (msgpack), written in turn:
    blocks n+1..2n     slot B              } the one that counts is never written to
    last block         second superblock

A snapshot is written whole, at unmount and before a shutdown. Memory for both slots is reserved in the media
ahead of need, so that what a program was told had succeeded always fits (``ensure_room``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import msgspec

from daxemu.errors import CorruptMetadata, DaxemuError, MediaError, NoSpace
from daxemu.fs.extents import ExtentMap
from daxemu.fs.namespace import Inode, Namespace
from daxemu.fs.rmap import METADATA_INO, Link, ReflinkProxy, Rmap
from daxemu.pmem.dax_device import DaxDevice
from daxemu.ranges import RangeSet
from daxemu.uapi import PAGE_SIZE, Block, Ino

MAGIC = "daxemu-fs"
VERSION = 1
MIN_REGION_BLOCKS = (2 << 20) // PAGE_SIZE
MAX_REGION_BLOCKS = (64 << 30) // PAGE_SIZE
INODE_BYTES, LINK_BYTES = 160, 48  # upper bounds of what one takes in a snapshot
RESERVE_STEP = 1 << 20


class Superblock(msgspec.Struct, array_like=True):
    magic: str
    version: int
    generation: int
    slot: int
    length: int
    checksum: bytes


class StoredInode(msgspec.Struct, array_like=True):
    """An inode as a snapshot holds it. ``links``: (file block, device block, blocks, proxy number or -1)
    each.
    """

    ino: Ino
    mode: int
    uid: int
    gid: int
    nlink: int
    rdev: int
    size: int
    atime: int
    mtime: int
    ctime: int
    entries: list[tuple[bytes, Ino]] | None
    links: list[tuple[int, int, int, int]] | None
    target: bytes | None
    xattrs: list[tuple[bytes, bytes]]


class Snapshot(msgspec.Struct, array_like=True):
    total_blocks: int
    next_ino: Ino
    inodes: list[StoredInode]


def _checksum(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


class Store:
    """Loads and saves the metadata of one device."""

    def __init__(self, dax: DaxDevice) -> None:
        self._dax = dax
        total = dax.size // PAGE_SIZE
        self.region_blocks = min(max(total // 64, MIN_REGION_BLOCKS), MAX_REGION_BLOCKS)
        self._slot_blocks = (self.region_blocks - 2) // 2
        self._reserved = 0
        self._super: Superblock | None = None

    @property
    def capacity(self) -> int:
        """Bytes that one snapshot can have."""
        return self._slot_blocks * PAGE_SIZE

    def _slot_offset(self, slot: int) -> int:
        return (1 + slot * self._slot_blocks) * PAGE_SIZE

    @property
    def _superblock_offsets(self) -> tuple[int, int]:
        return 0, (self.region_blocks - 1) * PAGE_SIZE

    def ensure_room(self, inodes: int, links: int, name_bytes: int) -> None:
        """Make sure that a snapshot of so much fits. Raises NoSpace when the region or the host's memory is
        too small.
        """
        wanted = PAGE_SIZE + inodes * INODE_BYTES + links * LINK_BYTES + name_bytes
        if wanted <= self._reserved:
            return
        if wanted > self.capacity:
            raise NoSpace("the metadata region is full: remove files, or make the device larger")
        wanted = min(-(-wanted // RESERVE_STEP) * RESERVE_STEP, self.capacity)
        for slot in (0, 1):
            self._dax.reserve(self._slot_offset(slot), wanted)
        for offset in self._superblock_offsets:
            self._dax.reserve(offset, PAGE_SIZE)
        self._reserved = wanted

    # -- saving

    def save(self, namespace: Namespace) -> None:
        """Write a snapshot into the slot that does not count, then make it count.

        Raises NoDevice after removal, NoSpace if ensure_room() was not asked first.
        """
        data = msgspec.msgpack.encode(
            Snapshot(self._dax.size // PAGE_SIZE, namespace.next_ino, list(_stored_inodes(namespace)))
        )
        if len(data) > self.capacity:
            raise NoSpace(f"metadata of {len(data)} bytes does not fit its slot of {self.capacity}")
        generation = self._super.generation + 1 if self._super else 1
        slot = 1 - self._super.slot if self._super else 0
        self._write(self._slot_offset(slot), data)
        superblock = Superblock(MAGIC, VERSION, generation, slot, len(data), _checksum(data))
        # A copy that is poisoned stays so, for fsck to find, as long as the other is good.
        good = [offset for offset in self._superblock_offsets if not self._dax.is_poisoned(offset, PAGE_SIZE)]
        for offset in good or self._superblock_offsets:
            self._write(offset, _seal(msgspec.msgpack.encode(superblock)))
        self._super = superblock

    def _write(self, offset: int, data: bytes) -> None:
        """Whole blocks are written, so poison in them is cleared."""
        padded = data + bytes(-len(data) % PAGE_SIZE)
        self._dax.reserve(offset, len(padded))
        self._dax.recovery_write(offset, padded)

    # -- loading

    def is_formatted(self) -> bool:
        """Whether there is a superblock; poison where it should be counts as one, so that nothing is
        overwritten.
        """
        for offset in self._superblock_offsets:
            self._dax.reserve(offset, PAGE_SIZE)
            if self._dax.is_poisoned(offset, PAGE_SIZE) or any(self._dax.direct_access(offset, PAGE_SIZE)):
                return True
        return False

    def load(self, namespace: Namespace, rmap: Rmap) -> None:
        """Fill an empty ``namespace`` and ``rmap`` from the snapshot that counts.

        Raises CorruptMetadata if it cannot be read or makes no sense; what was filled then must be thrown
        away.
        """
        self._super = self._read_superblock()
        if self._super.length > self.capacity or self._super.slot not in (0, 1):
            raise CorruptMetadata(f"{self._dax.name}: the superblock points outside the metadata region")
        try:
            data = self._dax.direct_access(self._slot_offset(self._super.slot), self._super.length)
        except MediaError as error:
            raise CorruptMetadata(f"{self._dax.name}: metadata is poisoned; run: daxemu fsck") from error
        if _checksum(data) != self._super.checksum:
            raise CorruptMetadata(f"{self._dax.name}: metadata does not match its checksum; run: daxemu fsck")
        try:
            snapshot = msgspec.msgpack.decode(data, type=Snapshot)
        except msgspec.MsgspecError as error:
            raise CorruptMetadata(f"{self._dax.name}: metadata is malformed: {error}") from error
        if snapshot.total_blocks != self._dax.size // PAGE_SIZE:
            raise CorruptMetadata(f"{self._dax.name}: metadata is of a device of another size")
        _adopt_inodes(snapshot.inodes, namespace, rmap, snapshot.total_blocks)
        namespace.reserve_inos(snapshot.next_ino)

    def _read_superblock(self) -> Superblock:
        found: list[Superblock] = []
        why = "it is all zeros"
        for offset in self._superblock_offsets:
            try:
                found.append(
                    msgspec.msgpack.decode(
                        _unseal(self._dax.direct_access(offset, PAGE_SIZE)), type=Superblock
                    )
                )
            except (DaxemuError, msgspec.MsgspecError) as error:
                why = str(error)
        if not found:
            raise CorruptMetadata(f"{self._dax.name}: neither superblock can be read ({why})")
        newest = max(found, key=lambda superblock: superblock.generation)
        if newest.magic != MAGIC or newest.version != VERSION:
            raise CorruptMetadata(f"{self._dax.name}: not a filesystem of this version ({newest.version})")
        return newest


def _seal(data: bytes) -> bytes:
    """One block: length, checksum, data, zeros."""
    return (len(data).to_bytes(4, "little") + _checksum(data) + data).ljust(PAGE_SIZE, b"\0")


def _unseal(block: memoryview) -> memoryview:
    length = int.from_bytes(block[:4], "little")
    data = block[20 : 20 + length]
    if not 0 < length <= PAGE_SIZE - 20 or _checksum(data) != bytes(block[4:20]):
        raise CorruptMetadata("a superblock does not match its checksum")
    return data


def _stored_inodes(namespace: Namespace) -> Iterator[StoredInode]:
    """Every inode that has a link; an unlinked one that is still open ends with the mount."""
    numbers: dict[ReflinkProxy, int] = {}
    for inode in namespace:
        if inode.nlink == 0:
            continue
        links = None
        if inode.extents is not None:
            links = [
                (
                    link.file_block,
                    link.dev_block,
                    link.length,
                    -1 if link.proxy is None else numbers.setdefault(link.proxy, len(numbers)),
                )
                for link in inode.extents
            ]
        yield StoredInode(
            inode.ino,
            inode.mode,
            inode.uid,
            inode.gid,
            inode.nlink,
            inode.rdev,
            inode.size,
            inode.atime,
            inode.mtime,
            inode.ctime,
            None if inode.entries is None else list(inode.entries.items()),
            links,
            inode.target,
            list(inode.xattrs.items()),
        )


def _adopt_inodes(
    stored: Iterable[StoredInode], namespace: Namespace, rmap: Rmap, total_blocks: Block
) -> None:
    proxies: dict[int, ReflinkProxy] = {}
    for record in stored:
        inode = Inode(
            record.ino,
            record.mode,
            record.uid,
            record.gid,
            record.nlink,
            record.rdev,
            record.size,
            record.atime,
            record.mtime,
            record.ctime,
            entries=None if record.entries is None else dict(record.entries),
            target=record.target,
            xattrs=dict(record.xattrs),
        )
        if record.links is not None:
            inode.extents = ExtentMap(record.ino, rmap)
            links = []
            for file_block, dev_block, length, number in record.links:
                if length <= 0 or dev_block < 0 or dev_block + length > total_blocks:
                    raise CorruptMetadata(
                        f"inode {record.ino}: blocks {dev_block}+{length} are outside the device"
                    )
                proxy = None if number < 0 else proxies.setdefault(number, ReflinkProxy())
                links.append(Link(record.ino, file_block, dev_block, length, proxy))
            inode.extents.adopt(links)
        namespace.adopt(inode)
    namespace.name_children()


def metadata_map(rmap: Rmap, blocks: int) -> ExtentMap:
    """The extents of the metadata region, so that the reverse map knows whose its blocks are."""
    extents = ExtentMap(METADATA_INO, rmap)
    extents.insert(0, 0, blocks)
    return extents


def used_blocks(rmap: Rmap) -> RangeSet:
    """Every block with a link."""
    return RangeSet((link.dev_block, link.dev_end) for link in rmap)
