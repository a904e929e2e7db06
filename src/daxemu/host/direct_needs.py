"""Needs of ``daxemu mount --direct`` on this machine. No check changes anything."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator

from daxemu.errors import Unsupported
from daxemu.host.direct import userfaultfd
from daxemu.host.proc.processes import capable
from daxemu.uapi import CAP_SYS_PTRACE


def missing() -> Iterator[tuple[str, str]]:
    """Yield each missing need, and the command or place that supplies the need."""
    if platform.machine() != "x86_64":
        yield f"direct mappings are made on x86_64 only, not on {platform.machine()}", "use x86_64"
    if (uid := os.geteuid()) != 0:
        # daxemu run offers the listener of a program to the supervisors of root alone.
        yield f"direct mounts are root's, also where uid {uid} has CAP_SYS_PTRACE", "run this as root"
        return
    if not capable("self", CAP_SYS_PTRACE):
        yield "no CAP_SYS_PTRACE", "in a container: --cap-add SYS_PTRACE"
        return  # without the capability userfaultfd(2) is refused, too
    try:
        lacking = userfaultfd.missing()
    except Unsupported as error:
        fix = "use a kernel with CONFIG_USERFAULTFD; in a container: --security-opt seccomp=unconfined"
        yield str(error), fix
    else:
        if lacking:
            yield f"userfaultfd of this kernel lacks {', '.join(lacking)}", "use Linux 6.6"


def check_direct() -> None:
    """Check the needs of direct mappings on the present machine. Raises Unsupported."""
    for what, fix in missing():
        raise Unsupported(f"mount --direct: {what}: {fix}, or mount without --direct")
