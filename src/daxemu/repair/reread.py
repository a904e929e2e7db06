"""Read lost data again from its source: a backing directory, or another mount."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from daxemu.errors import InvalidArgument
from daxemu.fs.data_ops import Origin
from daxemu.fs.rmap import Owner
from daxemu.ranges import Range
from daxemu.repair.arrays import SparseArray
from daxemu.repair.by_block import ByBlock
from daxemu.repair.strategy import Failure, Options
from daxemu.repair.volume import Volume
from daxemu.uapi import PAGE_SIZE
from daxemu.units import PFN_PHYS

CHANGED = 1


class RereadOptions(Options, frozen=True):
    """``path``: a directory with the same tree as the mount."""

    path: str = ""

    def validate(self) -> None:
        """Raise InvalidArgument unless ``path`` is an absolute path of a directory."""
        if not Path(self.path).is_absolute() or not Path(self.path).is_dir():
            raise InvalidArgument(f"reread:path={self.path}: must be the absolute path of a directory")

    def paths(self) -> Sequence[str]:
        """Return the backing directory."""
        return (self.path,)


class Reread(ByBlock):
    """Restore a block from the backing directory if the block was never stored to.

    The array ``changed`` has a flag for each block stored to since the strategy was chosen. At that time the
    two trees are assumed to be equal.
    """

    name = "reread"
    Options = RereadOptions
    watches = True

    def __init__(self, volume: Volume, options: Any) -> None:
        super().__init__(volume, options)
        self._path = Path(options.path)
        self._changed = SparseArray(volume.kept / "changed", "uint8", volume.blocks)

    def unmounting(self) -> None:
        """Close the array ``changed``, which stays on disk."""
        self._changed.close()

    def discard(self) -> None:
        """Close the array ``changed``. registry.forget() deletes the array."""
        self._changed.close()

    def store_begins(self, blocks: Sequence[Range], origin: Origin) -> None:
        """Flag the blocks: the backing files do not have the new data."""
        for run in blocks:
            self._changed.fill(run, CHANGED)

    def allocated(self, blocks: Range) -> None:
        """Flag the blocks: new blocks are zero, whatever the backing file holds."""
        self._changed.fill(blocks, CHANGED)

    def freed(self, blocks: Range) -> None:
        """Clear the flags of blocks without an owner."""
        self._changed.fill(blocks, 0)

    def why_not(self, block: int, failure: Failure) -> str | None:
        """See ByBlock."""
        if block in failure.stale or block in failure.unseen:
            return "mapped for writing: it may differ from the backing file"
        if self._changed.get(Range(block, block + 1))[0]:
            return "changed since it was read from the backing file"
        return None

    def restore(self, block: int) -> str | None:
        """Restore a block from the backing file of any owner."""
        reason = "no file owns the block"
        for owner in self.volume.owners(Range(block, block + 1)):
            path = self._path / self.volume.path_of(owner).lstrip("/")
            try:
                data = self._read(path, owner)
            except OSError as error:
                reason = f"{path}: {error.strerror}"
                continue
            if data is not None:
                self.volume.rewrite(block * PAGE_SIZE, data)
                return None
            reason = f"{path} differs in size"
        return reason

    def _read(self, path: Path, owner: Owner) -> bytes | None:
        with path.open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != self.volume.size_of(owner):
                return None
            return os.pread(file.fileno(), PAGE_SIZE, PFN_PHYS(owner.file_block)).ljust(PAGE_SIZE, b"\0")
