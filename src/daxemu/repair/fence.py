"""Shut the whole device down at the first failure, as famfs does."""

from __future__ import annotations

from daxemu.repair.strategy import Failure, Strategy, Verdict


class Fence(Strategy):
    """End all access: memory shared by several hosts cannot be repaired by one of them."""

    name = "fence"

    def failed(self, failure: Failure) -> Verdict:
        """Shut the filesystem down: every access is EIO, every load or store through a mapping SIGBUS."""
        self.volume.shutdown("Memory failure on a fenced device.  Shutting down filesystem.")
        return Verdict(reason="the device was shut down")
