"""Signal and leave the poison: the behaviour of every kernel."""

from __future__ import annotations

from daxemu.repair.strategy import Failure, Strategy, Verdict


class NoRepair(Strategy):
    """No repair: the default strategy."""

    name = "none"

    def failed(self, failure: Failure) -> Verdict:
        """Repair nothing."""
        return Verdict(reason="nothing is repaired")
