"""Superblock: the place of the metadata files on the device. Stored twice (fs/metadata_region.py).

0 .. 3      length of the record in bytes, little-endian
4 .. 19     BLAKE2b of the record
20 ..       the record: a :class:`Superblock` as MessagePack
"""

from __future__ import annotations

import hashlib

import msgspec

from daxemu.errors import CorruptMetadata, DaxemuError, MediaError, NoSpace
from daxemu.fs.metadata_page import CopyState, MetadataDamage, is_published
from daxemu.pmem.dax_device import DaxDevice
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE, Block, page_align_down
from daxemu.units import DIV_ROUND_UP, byte_span

MAGIC = "daxemu-fs"
VERSION, FORMER_VERSION = 3, 2
"""Present format, and the former format that a mount upgrades (fs/upgrade.py)."""
SUPER_BLOCKS = 16
_HEADER = 20
_SIZE = SUPER_BLOCKS * PAGE_SIZE


class Superblock(msgspec.Struct, array_like=True):
    """Record of a superblock. ``runs``: (file block, device block, blocks) of each extent of METADATA_INO,
    except the superblocks.
    """

    magic: str
    version: int
    generation: int
    total_blocks: int
    runs: list[tuple[int, int, int]]


def super_blocks(total: Block) -> tuple[Range, Range]:
    """Return the blocks of both superblocks, on a device of ``total`` blocks."""
    return Range(0, SUPER_BLOCKS), Range(total // 2, total // 2 + SUPER_BLOCKS)


def sealed(superblock: Superblock) -> bytes:
    """Encode a superblock with length and checksum, in whole pages. Raises NoSpace for too many runs."""
    record = msgspec.msgpack.encode(superblock)
    if len(record) > _SIZE - _HEADER:
        raise NoSpace("the metadata is in too many pieces for the superblock")
    whole = len(record).to_bytes(4, "little") + _checksum(record) + record
    return whole + bytes(-len(whole) % PAGE_SIZE)


def unsealed(dax: DaxDevice, blocks: Range) -> Superblock:
    """Read the superblock at ``blocks``. Raises MediaError for poison, CorruptMetadata for a corrupt
    record.
    """
    start = blocks.start * PAGE_SIZE
    length = int.from_bytes(dax.direct_access(start, PAGE_SIZE)[:4], "little")
    if not 0 < length <= _SIZE - _HEADER:
        raise CorruptMetadata("a superblock has an invalid length")
    whole = dax.direct_access(start, _HEADER + length)
    if _checksum(whole[_HEADER:]) != bytes(whole[4:_HEADER]):
        raise CorruptMetadata("a superblock does not match its checksum")
    try:
        return msgspec.msgpack.decode(whole[_HEADER:], type=Superblock)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptMetadata("a superblock's record cannot be decoded") from error


def names_filesystem(page: memoryview) -> bool:
    """Return whether ``page`` begins as a superblock, of any version, intact or not."""
    return MAGIC.encode() in bytes(page[_HEADER : 2 * _HEADER + len(MAGIC)])


def newest(dax: DaxDevice, *, version: int = VERSION) -> Superblock:
    """Return the valid superblock: the readable superblock with the higher generation. Raises CorruptMetadata
    if neither is readable, and for a format other than ``version``.
    """
    total = dax.size // PAGE_SIZE
    found: list[Superblock] = []
    why: list[str] = []
    for name, blocks in zip(("first", "second"), super_blocks(total), strict=True):
        try:
            found.append(unsealed(dax, blocks))
        except MediaError:
            why.append(f"the {name} is poisoned")
        except CorruptMetadata:
            why.append(f"the {name} has a wrong checksum")
    if not found:
        raise CorruptMetadata(f"{dax.name}: neither superblock can be read ({', '.join(why)})")
    superblock = max(found, key=lambda superblock: superblock.generation)
    if superblock.magic != MAGIC or superblock.version != version:
        hint = "copy its files off with the daxemu that made it, then mkfs --force"
        if superblock.version == FORMER_VERSION:
            hint = "a mount, or fsck --repair, upgrades it"
        raise CorruptMetadata(
            f"{dax.name}: the filesystem has format {superblock.version}, this daxemu reads {version}: {hint}"
        )
    if superblock.total_blocks != total:
        raise CorruptMetadata(f"{dax.name}: the filesystem was made on a device of another size")
    if not 0 < superblock.generation < 1 << 31:
        raise CorruptMetadata(f"{dax.name}: the superblock's generation is {superblock.generation}")
    return superblock


class Superblocks:
    """The two superblocks of a device. ``blocks``: the place of each."""

    def __init__(self, dax: DaxDevice) -> None:
        self._dax = dax
        self.blocks = super_blocks(dax.size // PAGE_SIZE)
        self.generation = 0
        """Generation of the superblocks that were loaded or written last; 0 if none were."""

    def is_formatted(self) -> bool:
        """Return True if the device holds a filesystem. Poison at the place of a superblock counts as a
        filesystem, so that the filesystem is not overwritten.
        """
        for blocks in self.blocks:
            offset = blocks.start * PAGE_SIZE
            if self._dax.is_poisoned(offset, PAGE_SIZE) or any(self._dax.direct_access(offset, PAGE_SIZE)):
                return True
        return False

    def check_blank(self) -> None:
        """Raise CorruptMetadata where the media holds metadata of a filesystem that was in use.

        Precondition: both superblocks are zeros. A new filesystem would silently replace the one whose
        superblocks were lost, or lie elsewhere since ``altmap`` in device.toml was changed.
        """
        for written in self._dax.written():
            for start in range(0, len(written), PAGE_SIZE):
                page = written[start : start + PAGE_SIZE]
                if names_filesystem(page) or is_published(page):
                    raise CorruptMetadata(
                        f"{self._dax.name}: both superblocks are zeros, but the device holds a filesystem's "
                        "metadata: restore a superblock or device.toml, or mkfs --force"
                    )

    def load(self, *, version: int) -> Superblock:
        """Return the valid superblock, see :func:`newest`."""
        superblock = newest(self._dax, version=version)
        self.generation = superblock.generation
        return superblock

    def write(self, runs: list[tuple[int, int, int]]) -> None:
        """Write both superblocks, which name ``runs``, with the next generation. Raises NoSpace for too many
        runs.
        """
        self.generation += 1
        total = self._dax.size // PAGE_SIZE
        data = sealed(Superblock(MAGIC, VERSION, self.generation, total, runs))
        # A poisoned copy stays poisoned while the other copy is good, so that fsck finds the poison.
        offsets = [blocks.start * PAGE_SIZE for blocks in self.blocks]
        good = [at for at in offsets if not self._dax.is_poisoned(at, len(data))]
        for offset in good or offsets:
            self._dax.recovery_write(offset, data)

    def damaged(self, *, is_clean: bool) -> list[MetadataDamage]:
        """Return the damage of each superblock."""
        states = self.states()
        is_repairable = CopyState.GOOD in states
        return [
            MetadataDamage(f"the {name} superblock {state}", is_repairable)
            for name, state in zip(("first", "second"), states, strict=True)
            if state is CopyState.POISONED
            or (state is not CopyState.GOOD and (is_clean or not is_repairable))
        ]

    def states(self) -> list[CopyState]:
        """Return the state of each superblock, relative to the generation of :meth:`load`. Without ``load``
        no superblock is GOOD.
        """
        states = []
        for blocks in self.blocks:
            if self._dax.is_poisoned(*byte_span(blocks)):
                states.append(CopyState.POISONED)
                continue
            try:
                is_current = unsealed(self._dax, blocks).generation == self.generation
                states.append(CopyState.GOOD if is_current else CopyState.STALE)
            except DaxemuError:
                states.append(CopyState.CORRUPT)
        return states

    def unusable(self) -> int:
        """Return the number of superblocks that are not GOOD."""
        return sum(state is not CopyState.GOOD for state in self.states())

    def clear_poison(self) -> int:
        """Write zeros over each poisoned page. Return the number of pages."""
        cleared = 0
        for blocks in self.blocks:
            for part in self._dax.poisoned(*byte_span(blocks)):
                first = max(page_align_down(part.start), blocks.start * PAGE_SIZE)
                last = min(DIV_ROUND_UP(part.end, PAGE_SIZE), blocks.end) * PAGE_SIZE
                self._dax.recovery_write(first, bytes(last - first))
                cleared += (last - first) // PAGE_SIZE
        return cleared


def _checksum(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
