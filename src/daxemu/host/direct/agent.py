"""Agent: a process that shares the memory of a program (clone(CLONE_VM)), and nothing else with the program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from daxemu.host.direct.syscalls import Syscall


class Agent(Protocol):
    """Maker of system calls in one address space. ``pid``: the agent, ``tgid``: the program."""

    @property
    def pid(self) -> int:
        """Process id of the agent."""

    @property
    def tgid(self) -> int:
        """Process id of the program."""

    async def run(self, batch: Sequence[Syscall]) -> list[int]:
        """Make the system calls in order, all of them whatever their results.

        Return the results; a negative result is -errno. Several tasks may call: batches run in the order of the
        calls, one after the other. Raises AddressSpaceGone if the process ended, or ends meanwhile: how many of
        the calls were made is not known then.
        """
