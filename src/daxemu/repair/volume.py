"""The filesystem as seen by its repair strategy: queries and changes.

Blocks are 4 KiB blocks of the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from daxemu.events import CorruptionFound
from daxemu.fs import failed_blocks
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.inode import RESERVED_INO
from daxemu.fs.reserved import ReservedFile
from daxemu.fs.rmap import METADATA_INO, Owner
from daxemu.private_path import PrivatePath
from daxemu.ranges import BlockRange, InBlocks, InBytes, Range, RangeSet, merged
from daxemu.uapi import PAGE_SIZE
from daxemu.units import byte_span, round_down


class Volume:
    """A mounted filesystem, for its strategy.

    Every change is done whole or not at all, even if the strategy is stopped in the middle (``atomically``).
    """

    def __init__(
        self,
        fs: Filesystem,
        directory: PrivatePath,
        atomically: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """``directory``: place for the strategy's files beside the device. The directory need not exist."""
        self._fs = fs
        self._atomically = atomically
        self.kept = directory
        self.reserved = ReservedFile(fs)

    # -- queries

    @property
    def directory(self) -> Path:
        """Directory for the strategy's files beside the device.

        The path is valid in this process, while mounted, even if DEVICE is renamed. Each mount audits the
        directory: only regular files and directories are allowed, no links.
        """
        return self.kept.as_path()

    @property
    def size(self) -> int:
        """Size of the device in bytes."""
        return self._fs.dax.size

    @property
    def blocks(self) -> int:
        """Number of blocks of the device."""
        return self._fs.allocator.total

    def in_use(self, blocks: BlockRange | None = None) -> RangeSet[InBlocks]:
        """Return the blocks of files: all of them, or the blocks inside ``blocks``."""
        owners = self.owners(blocks or Range(0, self.blocks))
        return RangeSet(merged(sorted((o.dev_block, o.dev_block + o.length) for o in owners)))

    def walk(self, most: int, unit: int = 1) -> Iterator[BlockRange]:
        """Yield all blocks that are not free, in order, in pieces of ``most`` blocks.

        Each piece begins at a multiple of ``unit`` blocks. The allocator is asked again at each step, so
        blocks allocated beyond the last piece during the walk are included.
        """
        at = 0
        while (run := self._fs.allocator.used_from(at)) is not None:
            start = round_down(run.start, unit)
            at = min(start + most, self.blocks)
            yield Range(start, at)

    def owners(self, blocks: BlockRange) -> Iterator[Owner]:
        """Yield the owners of ``blocks``, except metadata and the strategy's own copies."""
        for owner in self._fs.rmap.owners(*blocks):
            if owner.ino not in (METADATA_INO, RESERVED_INO):
                yield owner

    def path_of(self, owner: Owner) -> str:
        """Return the path of the owner's file, from the root of the mount."""
        return self._fs.names.path_of(owner.ino)

    def size_of(self, owner: Owner) -> int:
        """Return the size of the owner's file, in bytes."""
        return self._fs.names.get(owner.ino).size

    def read(self, blocks: BlockRange) -> memoryview:
        """Return a view of the media bytes of ``blocks``. Raises MediaError if any byte is poisoned."""
        return self._fs.dax.direct_access(*byte_span(blocks))

    def read_bytes(self, offset: int, length: int) -> bytes | memoryview:
        """Return ``length`` media bytes from byte ``offset`` on.

        Raises MediaError if any byte is poisoned.
        """
        return self._fs.dax.read(offset, length)

    def salvage(self, blocks: BlockRange) -> tuple[bytes, RangeSet[InBytes]]:
        """Return the contents of ``blocks``, with zeros for unreadable bytes, and those bytes of the
        device.
        """
        at, data = blocks.start * PAGE_SIZE, bytearray(blocks.length * PAGE_SIZE)
        poisoned = self.poison(blocks)
        for good in poisoned.gaps(at, at + len(data)):
            data[good.start - at : good.end - at] = self._fs.dax.read(good.start, good.length)
        return bytes(data), poisoned

    def poison(self, blocks: BlockRange) -> RangeSet[InBytes]:
        """Return the unreadable device bytes in ``blocks``, in whole sectors."""
        start, length = blocks.start * PAGE_SIZE, blocks.length * PAGE_SIZE
        return RangeSet(
            poisoned.clip(start, start + length) for poisoned in self._fs.dax.poisoned(start, length)
        )

    def poison_in(self, offset: int, length: int) -> bool:
        """Return True if any of the ``length`` device bytes from ``offset`` on is unreadable."""
        return self._fs.dax.is_poisoned(offset, length)

    def settled(self, blocks: BlockRange) -> Iterator[BlockRange]:
        """Yield the parts of ``blocks`` to which no program can store through a direct mapping.

        Such a store is unseen: the other parts may differ from the data that the strategy saw last.
        """
        yield from self._fs.mapped_stores.gaps(*blocks)

    # -- changes

    def rewrite(self, offset: int, data: bytes | memoryview) -> None:
        """Write ``data`` (whole sectors) to the device at byte ``offset``. Poison there is cleared."""
        with self._atomically():
            failed_blocks.rewrite(self._fs, offset, data)

    def relocate(self, blocks: BlockRange, data: bytes | memoryview) -> None:
        """Write ``data`` to newly allocated blocks, and remap all owners of ``blocks`` to the new blocks.

        Raises NoSpace.
        """
        with self._atomically():
            failed_blocks.relocate(self._fs, blocks, data)

    def punch(self, blocks: BlockRange) -> None:
        """Punch a hole over ``blocks`` in every file that owns a block."""
        with self._atomically():
            failed_blocks.punch(self._fs, blocks)

    def shutdown(self, reason: str) -> None:
        """Shut the whole filesystem down. Every later access is EIO."""
        with self._atomically():
            self._fs.shutdown(reason)

    def corrupt(self, offset: int, length: int, by: str, *, repaired: bool) -> None:
        """Emit CorruptionFound for device bytes that differ from the data last written.

        ``by``: "read" or "scrub".
        """
        self._fs.emit(CorruptionFound(offset=offset, length=length, by=by, repaired=repaired))
