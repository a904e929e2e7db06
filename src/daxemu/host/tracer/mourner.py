"""End of a mount whose supervisor was killed and lingers. A thread of the tracer process."""

from __future__ import annotations

import contextlib
import os
import signal
import time

from daxemu.host.proc import stat

_MOURNING_INTERVAL = 1.0  # seconds between looks at the supervisor


def mourn(supervisor: int, abort: int) -> None:
    """Cut the mount's connection (by the open fusectl file ``abort``) once the supervisor has been killed.

    The connection normally ends with a killed supervisor. Exception: a thread of the supervisor that waits on
    its own mount cannot die before its request is answered. The supervisor then lingers as a zombie, and
    every process that uses the mount waits.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # the other thread's
    while True:
        time.sleep(_MOURNING_INTERVAL)
        try:
            is_zombie = stat.read(supervisor).state == "Z"
        except OSError:
            return
        if is_zombie:
            with contextlib.suppress(OSError):  # cut already, or not permitted
                os.write(abort, b"1")
            return
