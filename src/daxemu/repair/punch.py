"""Punch poisoned blocks out of files. The allocator does not use the blocks again while poisoned."""

from __future__ import annotations

from daxemu.repair.strategy import Failure, Strategy, Verdict


class Punch(Strategy):
    """Punch a hole in every owner. The poison stays, in free space: the allocator skips bad blocks."""

    name = "punch"

    def failed(self, failure: Failure) -> Verdict:
        """Punch the blocks. The holes read as zeros."""
        verdict = Verdict(reason="punched out")
        for blocks in failure.blocks:
            self.volume.punch(blocks)
            verdict.lost.add(*blocks)
        return verdict
