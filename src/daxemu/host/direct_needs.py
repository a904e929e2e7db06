"""What ``daxemu mount --direct`` needs of this machine."""

from __future__ import annotations

import platform
from collections.abc import Iterator

from daxemu.errors import Unsupported
from daxemu.host.direct import userfaultfd
from daxemu.host.proc.processes import capable
from daxemu.uapi import CAP_SYS_PTRACE


def missing() -> Iterator[tuple[str, str]]:
    """Yield each missing need, with a command or a place that has it."""
    if platform.machine() != "x86_64":
        yield f"direct mappings are made on x86_64 only, not on {platform.machine()}", "use x86_64"
    if not capable("self", CAP_SYS_PTRACE):
        yield "no CAP_SYS_PTRACE", "run this as root; in a container: --cap-add SYS_PTRACE"
        return
    try:
        if lacking := userfaultfd.missing():
            yield f"this kernel lacks {', '.join(lacking)}", "use Linux 6.6 or later"
    except Unsupported as why:
        yield str(why), "use a kernel with CONFIG_USERFAULTFD, as root"


def check_direct() -> None:
    """Check that this machine can have direct mappings. Raises Unsupported."""
    for what, fix in missing():
        raise Unsupported(f"mount --direct: {what}: {fix}, or mount without --direct")
