"""Move what can still be read to other blocks, and never use the bad ones again while they are bad."""

from __future__ import annotations

from daxemu.errors import NoSpace
from daxemu.repair.strategy import Failure, Strategy, Verdict


class Quarantine(Strategy):
    """Poison is a matter of sectors, a failure one of pages: most of a page is often still good.

    The sectors that are bad become zeros; all the others are kept.
    """

    name = "quarantine"

    def failed(self, failure: Failure) -> Verdict:
        """A page that lost any sector is lost, however little of it that is."""
        verdict = Verdict(transparent=False, reason="what could be read was moved")
        for blocks in failure.blocks:
            data, bad = self.volume.salvage(blocks)
            try:
                self.volume.relocate(blocks, data)
            except NoSpace as error:
                verdict.reason = str(error)
                continue
            (verdict.lost if bad else verdict.recovered).add(*blocks)
        return verdict
