"""Move the readable sectors to other blocks.

The allocator does not use the old blocks again while poisoned.
"""

from __future__ import annotations

from daxemu.errors import NoSpace
from daxemu.repair.strategy import Failure, Strategy, Verdict


class Quarantine(Strategy):
    """Keep the readable sectors of a failed page, and replace the poisoned sectors by zeros.

    Poison counts by 512-byte sectors, a failure by 4 KiB pages: most sectors of a failed page are often
    readable.
    """

    name = "quarantine"

    def failed(self, failure: Failure) -> Verdict:
        """Relocate the blocks. A page with any unreadable sector is lost."""
        verdict = Verdict(transparent=False, reason="the readable sectors were moved")
        for blocks in failure.blocks:
            data, poisoned = self.volume.salvage(blocks)
            try:
                self.volume.relocate(blocks, data)
            except NoSpace as error:
                verdict.reason = str(error)
                continue
            (verdict.lost if poisoned else verdict.recovered).add(*blocks)
        return verdict
