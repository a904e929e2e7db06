"""Hooks on the bytes of files, for a repair strategy: declared here, implemented above (``repair``).

Every call is made with the filesystem in a consistent state, and must leave the state consistent. Blocks are
device blocks.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Protocol

from daxemu.ranges import BlockRange


class Origin(enum.Enum):
    """The path of a store to the filesystem."""

    SYSCALL = "syscall"
    MAPPED = "mapped"
    """A store through a mapping, written back now.

    On real DAX the store had reached the media long before, unseen.
    """


class DataOps(Protocol):
    """Notifications of every event on blocks of files."""

    def verify(self, blocks: BlockRange) -> None:
        """Check blocks before a read. Raises MediaError if the blocks do not hold the data last written."""

    def store_begins(self, blocks: Sequence[BlockRange], origin: Origin) -> None:
        """Prepare for a change of the blocks, whole or in part. The blocks still have the old contents.

        New blocks among them read as zeros. Raises NoSpace to refuse the store; then nothing has changed.
        """

    def store_done(self, blocks: Sequence[BlockRange], origin: Origin) -> None:
        """Process the new contents of the blocks of the last store_begins(). Poisoned blocks have none."""

    def mapped(self, blocks: BlockRange) -> None:
        """Note that programs can store to the blocks through direct mappings from now on, unseen.

        Raises NoSpace to refuse the store.
        """

    def unmapped(self, blocks: BlockRange) -> bool:
        """Process the contents of blocks to which no program can store through a mapping any more.

        Return False if the contents cannot be processed now: the blocks stay as after mapped().
        """

    def store_lost(self, blocks: BlockRange) -> None:
        """Note a store through a mapping, lost to poison in the blocks."""

    def allocated(self, blocks: BlockRange) -> None:
        """Note the first owner of free blocks. The blocks are zero."""

    def freed(self, blocks: BlockRange) -> None:
        """Note the loss of the last owner of blocks. The contents are discarded after the call."""

    def committed(self) -> None:
        """Note that all changes up to now survive a crash."""
