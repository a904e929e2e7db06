"""What strategies have in common that restore one block at a time."""

from __future__ import annotations

from abc import abstractmethod

from daxemu.repair.strategy import Failure, Strategy, Verdict


class ByBlock(Strategy):
    """For each bad block: is there a reason not to believe what is kept of it, and if not, put that back."""

    def failed(self, failure: Failure) -> Verdict:
        """Restore what can be restored; the last reason why something could not is the verdict's."""
        verdict = Verdict()
        for blocks in failure.blocks:
            for block in range(*blocks):
                reason = self.why_not(block, failure) or self.restore(block)
                if reason is None:
                    verdict.recovered.add(block, block + 1)
                else:
                    verdict.reason = reason
        return verdict

    @abstractmethod
    def why_not(self, block: int, failure: Failure) -> str | None:
        """Why what is kept of the block may not be what was last written; None if it is."""

    @abstractmethod
    def restore(self, block: int) -> str | None:
        """Put it back; why that was not possible, None if it was."""
