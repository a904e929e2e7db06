"""Parity that is updated once in a time window instead of at every store (Vilamb)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from daxemu.errors import InvalidArgument
from daxemu.fs.data_ops import Origin
from daxemu.ranges import Range
from daxemu.repair.parity import CHANGING, Parity, ParityOptions
from daxemu.repair.volume import Volume


class AsyncParityOptions(ParityOptions, frozen=True):
    """Options of parity, and ``window``: seconds for which a store may be unprotected."""

    window: float = 1.0

    def validate(self) -> None:
        """Raise InvalidArgument for an option out of range."""
        super().validate()
        if not 0 < self.window <= 3600:
            raise InvalidArgument(f"window={self.window}: must be more than 0 and at most 3600 seconds")


class AsyncParity(Parity):
    """Parity with deferred updates.

    A store only marks the stripes as changing, at almost no cost. Until the window ends, the stripes are
    unprotected, and the contents are not verified.
    """

    name = "async-parity"
    Options = AsyncParityOptions

    def __init__(self, volume: Volume, options: Any) -> None:
        super().__init__(volume, options)
        self.interval = options.window

    def store_begins(self, blocks: Sequence[Range], origin: Origin) -> None:
        """Mark the stripes of ``blocks`` as changing."""
        for run in self._followed(blocks):
            self._changing.fill(self._stripes_of(self._slices_of(run)), CHANGING)

    def store_done(self, blocks: Sequence[Range], origin: Origin) -> None:
        """Do nothing: parity is updated at the end of the window."""

    def freed(self, blocks: Range) -> None:
        """Mark the stripes that lose slices as changing."""
        for run in self._followed([blocks]):
            slices = self._slices_of(run)
            if self._known(slices):
                self._changing.fill(self._stripes_of(slices), CHANGING)

    def _known(self, slices: Range) -> list[Range]:
        return [part for part in self._sums.stored() if part.clip(*slices)]

    def tick(self) -> None:
        """Update the parity of all marked stripes, at the end of a window."""
        for stripes in list(self._changing.nonzero()):
            self._add_up(stripes)

    def unmounting(self) -> None:
        """Update the parity of all marked stripes, then close the arrays."""
        self.tick()
        super().unmounting()
