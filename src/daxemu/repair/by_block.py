"""What strategies have in common that restore one block at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from daxemu.ranges import Range
from daxemu.repair.strategy import Failure, Strategy, Verdict
from daxemu.repair.volume import Volume


class ByBlock(Strategy):
    """For each bad block: is there a reason not to believe what is kept of it, and if not, put that back.

    A strategy that begins goes over the device in order; of blocks from ``_seen`` on nothing is kept yet.
    """

    def __init__(self, volume: Volume, options: Any) -> None:
        super().__init__(volume, options)
        self._seen = volume.blocks

    def _followed(self, blocks: Sequence[Range]) -> Iterator[Range]:
        """The parts of which something is kept."""
        return (part for run in blocks if (part := run.clip(0, self._seen)))

    def failed(self, failure: Failure) -> Verdict:
        """Restore what can be restored; the last reason why something could not is the verdict's."""
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
        return f"{self.name} has not come to it yet" if block >= self._seen else None

    @abstractmethod
    def why_not(self, block: int, failure: Failure) -> str | None:
        """Why what is kept of the block may not be what was last written; None if it is."""

    @abstractmethod
    def restore(self, block: int) -> str | None:
        """Put it back; why that was not possible, None if it was."""
