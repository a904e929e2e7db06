"""What may watch over the bytes of files: declared here, implemented above (``repair``).

Every call is made with the filesystem in a consistent state, and must leave it so. Blocks are the device's.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Protocol

from daxemu.ranges import Range


class Origin(enum.Enum):
    """How a store came to the filesystem."""

    SYSCALL = "syscall"
    MAPPED = "mapped"
    """Through a mapping, and now written back. On real DAX it had reached the media unseen, long before."""


class DataOps(Protocol):
    """Told of everything that happens to blocks of files."""

    def verify(self, blocks: Range) -> None:
        """The blocks are about to be read. Raises MediaError if what is there is not what was written."""

    def store_begins(self, blocks: Sequence[Range], origin: Origin) -> None:
        """The blocks, or parts of them, are about to change; they still have their old contents.

        New blocks among them read as zeros. Raises NoSpace to refuse the store; nothing has changed then.
        """

    def store_done(self, blocks: Sequence[Range], origin: Origin) -> None:
        """The blocks of the last store_begins() have their new contents, but for what is poison."""

    def store_lost(self, blocks: Range) -> None:
        """A store through a mapping was lost to poison in these blocks."""

    def allocated(self, blocks: Range) -> None:
        """Free blocks got an owner; they read as zeros."""

    def freed(self, blocks: Range) -> None:
        """The blocks have no owner any more. Their contents are still there, and vanish next."""

    def committed(self) -> None:
        """What was done up to now survives a crash."""
