"""What a supervisor does to itself where a test wants it to die or to suffer at a certain place.

Called in the supervisor's process before it begins, see tests/support/zygote.py.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from typing import Any

from daxemu.host.operations import Operations
from daxemu.pmem.dax_device import DaxDevice


def die_at_access(number: int) -> None:
    """kill -9, just before it takes hold of media bytes for the n-th time."""
    access, left = DaxDevice.direct_access, number

    def counted(self: DaxDevice, offset: int, length: int) -> memoryview:
        nonlocal left
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return access(self, offset, length)

    DaxDevice.direct_access = counted  # type: ignore[method-assign]


def die_at_own_open() -> None:
    """kill -9 while one of its threads waits for it to open a file of its own mount."""
    answer = Operations.open

    async def deadly(self: Operations, inode: Any, flags: Any, ctx: Any) -> Any:
        if ctx.pid in map(int, os.listdir("/proc/self/task")):
            os.kill(os.getpid(), signal.SIGKILL)
        return await answer(self, inode, flags, ctx)

    Operations.open = deadly  # type: ignore[method-assign]


def tell_stacks() -> None:
    """On SIGUSR1, write where each of its threads is to its log; for who finds it hanging."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
