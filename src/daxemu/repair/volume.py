"""What a strategy may see of the filesystem it repairs, and do to it. Blocks are the device's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from daxemu.events import CorruptionFound
from daxemu.fs import heal
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.inode import RESERVED_INO
from daxemu.fs.reserved import ReservedFile
from daxemu.fs.rmap import METADATA_INO, Owner
from daxemu.private_path import PrivatePath
from daxemu.ranges import Range, RangeSet, merged
from daxemu.uapi import PAGE_SIZE


class Volume:
    """One mounted filesystem, for its strategy. Every change is whole or not at all, even if the strategy is
    stopped in the middle of it (``atomically``).
    """

    def __init__(
        self,
        fs: Filesystem,
        directory: PrivatePath,
        atomically: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """``directory`` is where a strategy keeps what is not on the device; it need not exist."""
        self._fs = fs
        self._atomically = atomically
        self.kept = directory
        self.reserved = ReservedFile(fs)

    # -- what is there

    @property
    def directory(self) -> Path:
        """Where a strategy keeps what is not on the device, whatever becomes of DEVICE's own path: valid in
        this process, while mounted. Audited at each mount: regular files and directories, no links.
        """
        return self.kept.as_path()

    @property
    def size(self) -> int:
        """Bytes of the device."""
        return self._fs.dax.size

    @property
    def blocks(self) -> int:
        """Blocks of the device."""
        return self._fs.allocator.total

    def in_use(self, blocks: Range | None = None) -> RangeSet:
        """The blocks that files have, all or those in ``blocks``."""
        owners = self.owners(blocks or Range(0, self.blocks))
        return RangeSet(merged(sorted((o.dev_block, o.dev_block + o.length) for o in owners)))

    def walk(self, most: int, unit: int = 1) -> Iterator[Range]:
        """Everything that is not free, in order, in pieces of ``most`` blocks that begin at a multiple of
        ``unit``. Looks again at each step: what comes into use behind the last piece is not passed over.
        """
        at = 0
        while (run := self._fs.allocator.used_from(at)) is not None:
            start = run.start // unit * unit
            at = min(start + most, self.blocks)
            yield Range(start, at)

    def owners(self, blocks: Range) -> Iterator[Owner]:
        """Every file's use of ``blocks``. Neither metadata nor a strategy's own copies."""
        for owner in self._fs.rmap.owners(*blocks):
            if owner.ino not in (METADATA_INO, RESERVED_INO):
                yield owner

    def path_of(self, owner: Owner) -> str:
        """Where the file is, from the root of the mount."""
        return self._fs.names.path_of(owner.ino)

    def size_of(self, owner: Owner) -> int:
        """Bytes of the file."""
        return self._fs.names.get(owner.ino).size

    def read(self, blocks: Range) -> memoryview:
        """The live bytes of ``blocks``. Raises MediaError if any of them is poison."""
        return self._fs.dax.direct_access(blocks.start * PAGE_SIZE, blocks.length * PAGE_SIZE)

    def read_bytes(self, offset: int, length: int) -> memoryview:
        """The live bytes of the device from ``offset`` on. Raises MediaError if any of them is poison."""
        return self._fs.dax.direct_access(offset, length)

    def salvage(self, blocks: Range) -> tuple[bytes, RangeSet]:
        """What can be read of ``blocks``, zeros elsewhere; and the device bytes that cannot."""
        at, data = blocks.start * PAGE_SIZE, bytearray(blocks.length * PAGE_SIZE)
        bad = self.poison(blocks)
        for good in bad.gaps(at, at + len(data)):
            data[good.start - at : good.end - at] = self._fs.dax.direct_access(good.start, good.length)
        return bytes(data), bad

    def poison(self, blocks: Range) -> RangeSet:
        """The device bytes in ``blocks`` that cannot be read, in whole sectors."""
        start, length = blocks.start * PAGE_SIZE, blocks.length * PAGE_SIZE
        return RangeSet(bad.clip(start, start + length) for bad in self._fs.dax.poisoned(start, length))

    def poison_in(self, offset: int, length: int) -> bool:
        """Whether any of these bytes of the device cannot be read."""
        return self._fs.dax.is_poisoned(offset, length)

    # -- what can be done

    def rewrite(self, offset: int, data: bytes | memoryview) -> None:
        """Put ``data`` (whole sectors) on the device at byte ``offset``; poison there is cleared."""
        with self._atomically():
            heal.rewrite(self._fs, offset, data)

    def relocate(self, blocks: Range, data: bytes | memoryview) -> None:
        """Put ``data`` into other blocks, for all who have ``blocks``. Raises NoSpace."""
        with self._atomically():
            heal.relocate(self._fs, blocks, data)

    def punch(self, blocks: Range) -> None:
        """Make a hole of ``blocks`` in every file that has them."""
        with self._atomically():
            heal.punch(self._fs, blocks)

    def shutdown(self, reason: str) -> None:
        """Give the whole filesystem up: everything is EIO from now on."""
        with self._atomically():
            self._fs.shutdown(reason)

    def corrupt(self, offset: int, length: int, by: str, *, repaired: bool) -> None:
        """Say that bytes of the device were not what was written, by a "read" or a "scrub"."""
        self._fs.emit(CorruptionFound(offset=offset, length=length, by=by, repaired=repaired))
