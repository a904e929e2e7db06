"""What a repair strategy is: what it sees, and what it answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import msgspec

from daxemu.fs.data_ops import Origin
from daxemu.ranges import Range, RangeSet
from daxemu.repair.volume import Volume


@dataclass(frozen=True)
class Failure:
    """Blocks of the device that hold poison, all of them in use.

    ``unseen``: those of them that a program may have stored to through a mapping since the filesystem last
    saw their contents. On real DAX such a store goes to the media past everybody, so a copy or a checksum
    made before it is stale. Where it is known that one was lost, they are in ``stale``. ``copies``: positions
    in the reserved file whose blocks went bad.
    """

    blocks: tuple[Range, ...]
    unseen: RangeSet = field(default_factory=RangeSet)
    stale: RangeSet = field(default_factory=RangeSet)
    copies: tuple[Range, ...] = ()


@dataclass
class Verdict:
    """What became of a failure's blocks. Those in neither set are as bad as before.

    ``recovered``: they read as what was last written. ``lost``: they can be read again, but hold something
    else. With ``transparent`` whoever maps recovered pages need not know.
    """

    recovered: RangeSet = field(default_factory=RangeSet)
    lost: RangeSet = field(default_factory=RangeSet)
    transparent: bool = True
    reason: str | None = None

    def word(self, failure: Failure) -> Literal["recovered", "lost", "cannot"]:
        """The worst of it in one word."""
        if any(not self.recovered.covers(*blocks) for blocks in failure.blocks):
            both = RangeSet([*self.recovered, *self.lost])
            return "lost" if all(both.covers(*blocks) for blocks in failure.blocks) else "cannot"
        return "recovered"


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The options of a strategy that has none; those of others derive from it."""

    def validate(self) -> None:
        """Raises InvalidArgument for values that are of the right type and cannot be all the same."""

    def paths(self) -> Sequence[str]:
        """Directories that will be read from; none may be on the mount that is repaired."""
        return ()


class Strategy(Protocol):
    """A repair strategy. Only :meth:`failed` must be written; the rest does nothing unless it is.

    Made at mount, with the options of ``--repair NAME:key=value``. ``watches``: it wants to be told of stores
    and reads. ``has_copies``: it uses the reserved file. ``interval``: seconds between calls of :meth:`tick`,
    or None.
    """

    name: ClassVar[str]
    volume: Volume
    Options: ClassVar[type[Options]] = Options
    watches: ClassVar[bool] = False
    has_copies: ClassVar[bool] = False
    interval: float | None = None

    @classmethod
    def layout(cls, options: Any) -> str:
        """What its arrays are called: other options that need other arrays have another name."""
        return cls.name

    def __init__(self, volume: Volume, options: Any) -> None:
        """``options`` is an ``Options``. Raises DaxemuError to refuse the mount."""
        self.volume = volume

    def mounted(self, *, after_crash: bool) -> Iterator[Range] | None:
        """The filesystem is there, and whole; bring what is kept of it up to date. If that takes long, a
        bounded piece at a time, yielding the blocks that were seen to.

        ``after_crash``: free blocks were zeroed, and what was not committed is gone. Raises DaxemuError
        to refuse. Between two pieces files are used, and all else of this class is called, for blocks that
        were not seen to as well. If it ends early, what was kept is thrown away, and it begins anew.
        """
        return None

    def unmounting(self) -> None:
        """The last call before the final commit."""

    def discard(self) -> None:
        """Another strategy takes over: give all space back."""

    def failed(self, failure: Failure) -> Verdict:
        """These blocks went bad; nobody has them mapped any more. What became of them?"""
        ...

    # -- see fs/data_ops.py

    def verify(self, blocks: Range) -> None:
        """The blocks are about to be read. Raises MediaError if they are not what was written."""

    def store_begins(self, blocks: Sequence[Range], origin: Origin) -> None:
        """The blocks are about to change. Raises NoSpace to refuse the store."""

    def store_done(self, blocks: Sequence[Range], origin: Origin) -> None:
        """They have changed."""

    def allocated(self, blocks: Range) -> None:
        """The blocks are in use, and zero."""

    def freed(self, blocks: Range) -> None:
        """The blocks are in use no more, and vanish next."""

    def committed(self) -> None:
        """What was done up to now survives a crash."""

    # -- in the background

    def scrub(self) -> Iterator[Range]:
        """Look at everything, a bounded piece at a time; yields the blocks looked at, in any order."""
        return iter(())

    def tick(self) -> None:
        """``interval`` seconds have gone by."""

    def space_bytes(self) -> int:
        """What is kept for repair, in bytes, on the device and beside it."""
        return 0
