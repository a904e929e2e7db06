"""Tell and leave: what every kernel does."""

from __future__ import annotations

from daxemu.repair.strategy import Failure, Strategy, Verdict


class NoRepair(Strategy):
    """The default."""

    name = "none"

    def failed(self, failure: Failure) -> Verdict:
        """Nothing is done."""
        return Verdict(reason="nothing is repaired")
