"""Base class of the strategies that restore one block at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from daxemu.ranges import Range
from daxemu.repair.strategy import Failure, Strategy, Verdict
from daxemu.repair.volume import Volume


class ByBlock(Strategy):
    """Restore each failed block from stored repair data, unless the data may be out of date.

    A new strategy builds its repair data in the order of the device. Blocks from ``_seen`` on have no data
    yet.
    """

    def __init__(self, volume: Volume, options: Any) -> None:
        super().__init__(volume, options)
        self._seen = volume.blocks

    def _followed(self, blocks: Sequence[Range]) -> Iterator[Range]:
        """Yield the parts of ``blocks`` with repair data."""
        return (part for run in blocks if (part := run.clip(0, self._seen)))

    def failed(self, failure: Failure) -> Verdict:
        """Restore each block that can be restored.

        The verdict's reason is the last reason against a block.
        """
        verdict = Verdict()
        for blocks in failure.blocks:
            for block in range(*blocks):
                reason = self._why_not_yet(block) or self.why_not(block, failure) or self.restore(block)
                if reason is None:
                    verdict.recovered.add(block, block + 1)
                else:
                    verdict.reason = reason
        return verdict

    def _why_not_yet(self, block: int) -> str | None:
        return f"{self.name} has not processed the block yet" if block >= self._seen else None

    @abstractmethod
    def why_not(self, block: int, failure: Failure) -> str | None:
        """Return why the repair data of ``block`` may be out of date; None if the data is up to date."""

    @abstractmethod
    def restore(self, block: int) -> str | None:
        """Restore ``block`` from the repair data. Return the reason for a failure; None on success."""
