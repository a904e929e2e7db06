"""Clear the poison: the pages are good again, and empty."""

from __future__ import annotations

from daxemu.repair.strategy import Failure, Strategy, Verdict
from daxemu.uapi import PAGE_SIZE


class Zero(Strategy):
    """Every page that holds poison becomes zeros, in all files that share it."""

    name = "zero"

    def failed(self, failure: Failure) -> Verdict:
        """All of it is lost, and can be used again."""
        verdict = Verdict(reason="filled with zeros")
        for blocks in failure.blocks:
            self.volume.rewrite(blocks.start * PAGE_SIZE, bytes(blocks.length * PAGE_SIZE))
            verdict.lost.add(*blocks)
        return verdict
