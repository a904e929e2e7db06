"""Give up the whole device at the first failure (what famfs does)."""

from __future__ import annotations

from daxemu.repair.strategy import Failure, Strategy, Verdict


class Fence(Strategy):
    """Shared memory that several hosts use cannot be repaired by one of them: all access ends."""

    name = "fence"

    def failed(self, failure: Failure) -> Verdict:
        """Everything is EIO, and SIGBUS for whoever maps it."""
        self.volume.shutdown("Memory failure on a fenced device.  Shutting down filesystem.")
        return Verdict(reason="the device was given up")
