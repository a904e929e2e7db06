"""Agent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from daxemu.host.direct.syscalls import Syscall


class AddressSpaceGone(Exception):
    """The address space has ended."""


class Agent(Protocol):
    """A process that shares an address space, and makes system calls there."""

    pid: int
    tgid: int

    async def run(self, batch: Sequence[Syscall]) -> list[int]:
        """Make the calls; return their results, -errno for an error. Raises AddressSpaceGone."""
