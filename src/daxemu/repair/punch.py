"""Take the bad blocks out of their files, and never use them again while they are bad."""

from __future__ import annotations

from daxemu.repair.strategy import Failure, Strategy, Verdict


class Punch(Strategy):
    """As zero, but the poison stays where it is, in free space: the allocator passes over badblocks."""

    name = "punch"

    def failed(self, failure: Failure) -> Verdict:
        """The files have holes there, which read as zeros."""
        verdict = Verdict(reason="punched out")
        for blocks in failure.blocks:
            self.volume.punch(blocks)
            verdict.lost.add(*blocks)
        return verdict
