"""The interface of a repair strategy: calls from the supervisor, and the verdict on a failure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import msgspec

from daxemu.fs.data_ops import Origin
from daxemu.ranges import BlockRange, RangeSet
from daxemu.repair.volume import Volume


@dataclass(frozen=True)
class Failure:
    """Blocks of the device with poison, all of them in use.

    ``unseen``: blocks of the failure to which a program may have stored through a mapping since the
    filesystem last saw the contents. On real DAX such a store reaches the media without any call to the
    filesystem, so a copy or a checksum made before the store is out of date. ``stale``: blocks with a store
    known to be lost. ``copies``: positions (in blocks) of the reserved file whose blocks failed.
    """

    blocks: tuple[BlockRange, ...]
    unseen: RangeSet = field(default_factory=RangeSet)
    stale: RangeSet = field(default_factory=RangeSet)
    copies: tuple[BlockRange, ...] = ()


@dataclass
class Verdict:
    """The result of a repair, by block. A block in neither set is still poisoned.

    ``recovered``: blocks with the data last written. ``lost``: blocks that are readable again, with other
    data. ``transparent``: processes with recovered pages mapped are not signalled.
    """

    recovered: RangeSet = field(default_factory=RangeSet)
    lost: RangeSet = field(default_factory=RangeSet)
    transparent: bool = True
    reason: str | None = None

    def word(self, failure: Failure) -> Literal["recovered", "lost", "cannot"]:
        """Return "recovered" if every block is, "cannot" if any block is in no set, "lost" otherwise."""
        if any(not self.recovered.covers(*blocks) for blocks in failure.blocks):
            both = RangeSet([*self.recovered, *self.lost])
            return "lost" if all(both.covers(*blocks) for blocks in failure.blocks) else "cannot"
        return "recovered"


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The options of a strategy; this base class has none.

    A strategy with options derives a class from it.
    """

    def validate(self) -> None:
        """Raise InvalidArgument for an option whose value is of the right type but out of range."""

    def paths(self) -> Sequence[str]:
        """Return the directories that the strategy reads. None may be on the repaired mount."""
        return ()


class Strategy(Protocol):
    """A repair strategy. Only :meth:`failed` must be written; each other method does nothing by default.

    Created at mount, with the options of ``--repair NAME:key=value``. ``watches``: the strategy is called for
    stores and reads. ``has_copies``: the strategy uses the reserved file. ``interval``: seconds between calls
    of :meth:`tick`, or None.
    """

    name: ClassVar[str]
    volume: Volume
    Options: ClassVar[type[Options]] = Options
    watches: ClassVar[bool] = False
    has_copies: ClassVar[bool] = False
    interval: float | None = None

    @classmethod
    def layout(cls, options: Any) -> str:
        """Return the name of the strategy's directory.

        Options that need other arrays must give another name.
        """
        return cls.name

    def __init__(self, volume: Volume, options: Any) -> None:
        """Create the strategy. ``options`` is an ``Options``. Raises DaxemuError to refuse the mount."""
        self.volume = volume

    def mounted(self, *, after_crash: bool) -> Iterator[BlockRange] | None:
        """Bring the stored repair data up to date. The filesystem is mounted and consistent.

        A long update is a generator: each piece of work is bounded, and yields the blocks that were
        processed. Between two pieces, files are used, and all other methods are called, even for blocks not
        processed yet. If the update ends early, the stored repair data is deleted, and the next mount starts
        again.

        ``after_crash``: free blocks were zeroed, and uncommitted changes are gone. Raises DaxemuError to
        refuse the mount.
        """
        return None

    def unmounting(self) -> None:
        """Prepare for unmount. The last call before the final commit."""

    def discard(self) -> None:
        """Free all space used by the strategy. Called when another strategy is chosen."""

    def failed(self, failure: Failure) -> Verdict:
        """Repair the failed blocks, and return a verdict. No process has the blocks mapped any more."""
        ...

    # -- see fs/data_ops.py

    def verify(self, blocks: BlockRange) -> None:
        """Check blocks before a read. Raises MediaError if the blocks do not hold the data last written."""

    def store_begins(self, blocks: Sequence[BlockRange], origin: Origin) -> None:
        """Prepare for a change of ``blocks``. Raises NoSpace to refuse the store."""

    def store_done(self, blocks: Sequence[BlockRange], origin: Origin) -> None:
        """Process the new contents of ``blocks``."""

    def allocated(self, blocks: BlockRange) -> None:
        """Note that ``blocks`` are in use now, and zero."""

    def freed(self, blocks: BlockRange) -> None:
        """Note that ``blocks`` are about to become free."""

    def committed(self) -> None:
        """Note that all changes up to now survive a crash."""

    # -- in the background

    def scrub(self) -> Iterator[BlockRange]:
        """Check all data, in bounded pieces. Yields the checked blocks, in any order."""
        return iter(())

    def tick(self) -> None:
        """Do periodic work. Called every ``interval`` seconds."""

    def space_bytes(self) -> int:
        """Return the size of the repair data in bytes, on the device and beside the device."""
        return 0
