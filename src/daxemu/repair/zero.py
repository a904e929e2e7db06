"""Clear the poison. The pages are readable, and zero."""

from __future__ import annotations

from daxemu.repair.strategy import Failure, Strategy, Verdict
from daxemu.uapi import PAGE_SIZE


class Zero(Strategy):
    """Zero every failed page, in all files sharing the page."""

    name = "zero"

    def failed(self, failure: Failure) -> Verdict:
        """Write zeros to the blocks. All data of the blocks is lost."""
        verdict = Verdict(reason="filled with zeros")
        for blocks in failure.blocks:
            self.volume.rewrite(blocks.start * PAGE_SIZE, bytes(blocks.length * PAGE_SIZE))
            verdict.lost.add(*blocks)
        return verdict
