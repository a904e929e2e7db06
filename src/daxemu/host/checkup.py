"""Checks of this machine for ``daxemu doctor``: needs of daxemu, with a command for each missing part.

A check changes nothing on the machine.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from daxemu.errors import Busy, NotMounted, PermissionDenied
from daxemu.host import victims
from daxemu.host.proc.mountinfo import Mount, mounts, printable
from daxemu.host.proc.pagemap import Pagemap
from daxemu.host.proc.processes import capable
from daxemu.uapi import CAP_SYS_ADMIN, CAP_SYS_PTRACE

FUSE = Path("/dev/fuse")
CONNECTIONS = Path("/sys/fs/fuse/connections")
PTRACE_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")
SHARED = Path("/dev/shm")
MIN_SHARED = 64 << 20
_GIVE_TO_USERS = f"chmod 0666 {FUSE}"

Verdict = Literal["ok", "worse", "missing"]
"""``worse``: a feature is lost or slower; ``missing``: no mount is possible."""


class Finding(NamedTuple):
    """Result of one check: ``found``, the verdict, and the command (``mend``) for a better one."""

    subject: str
    verdict: Verdict
    found: str
    mend: str = ""


Answers = Callable[[Mount], None]
"""Asks the supervisor of a mount for a sign of life.

Raises NotMounted for a dead supervisor, Busy for a hanging one, PermissionDenied for another user's.
"""


def check_up(answers: Answers) -> Iterator[Finding]:
    """Yield the finding of every check, in the order of the report."""
    yield _fuse()
    if os.geteuid() == 0:
        yield _fuse_of_users()
    yield _mounting()
    yield _pyfuse3()
    yield _supplement()
    yield _victims()
    yield _shared_memory()
    yield _tracing()
    yield _abort()
    yield _kernel()
    yield _presence()
    seccomp = _seccomp()
    yield seccomp
    yield _direct(seccomp)
    yield from _stale(answers)


def _fuse() -> Finding:
    try:
        os.close(os.open(FUSE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        in_container = "in a container: run it with --device /dev/fuse"
        fix = {
            FileNotFoundError: f"modprobe fuse; {in_container}",
            PermissionError: f"{_GIVE_TO_USERS} (as root); {in_container}",
        }.get(type(error), in_container)
        return Finding("FUSE", "missing", f"{FUSE}: {error.strerror}", fix)
    return Finding("FUSE", "ok", f"{FUSE} can be opened")


def _fuse_of_users() -> Finding:
    """Check the mode of /dev/fuse for users other than root; _fuse() reports a missing node."""
    subject = "FUSE of users"
    try:
        mode = stat.S_IMODE(FUSE.stat().st_mode)
    except OSError as error:
        return Finding(subject, "worse", f"{FUSE}: {error.strerror}", "modprobe fuse")
    if mode & 0o006 == 0o006:
        return Finding(subject, "ok", f"{FUSE} is {mode:04o}: every user may mount")
    return Finding(
        subject,
        "worse",
        f"{FUSE} is {mode:04o}: only root, and its group at most, may mount",
        f"{_GIVE_TO_USERS}; docs/howto/without-root.md says how to keep that, and how to do without",
    )


def _mounting() -> Finding:
    if os.geteuid() == 0:
        if capable("self", CAP_SYS_ADMIN):
            return Finding("mounting", "ok", "root, with CAP_SYS_ADMIN")
        return Finding(
            "mounting",
            "missing",
            "root, but without CAP_SYS_ADMIN",
            "in a container: --cap-add SYS_ADMIN",
        )
    helper = shutil.which("fusermount3")
    if helper is None:
        return Finding("mounting", "missing", "no fusermount3", "apt-get install fuse3")
    if not Path(helper).stat().st_mode & stat.S_ISUID:
        return Finding("mounting", "missing", f"{helper} is not set-user-ID", f"chmod u+s {helper} (as root)")
    return Finding("mounting", "ok", f"through {helper}; only you see your mounts")


def _pyfuse3() -> Finding:
    done = subprocess.run([sys.executable, "-c", "import pyfuse3"], capture_output=True, text=True)
    if done.returncode:
        found = (done.stderr.strip().splitlines() or ["import failed"])[-1]
        return Finding(
            "pyfuse3", "missing", found, "apt-get install libfuse3-dev pkg-config gcc; pip install pyfuse3"
        )
    return Finding("pyfuse3", "ok", "can be imported")


def _supplement() -> Finding:
    from daxemu.host.fuse import supplement

    if supplement.MISSING is not None:
        return Finding(
            "supplement",
            "worse",
            f"{supplement.MISSING}: no exact signals for loads, no fallocate, no cheap cp",
            "apt-get install libfuse3-dev pkg-config gcc; pip install --force-reinstall --no-deps daxemu",
        )
    return Finding("supplement", "ok", "loaded")


def _victims() -> Finding:
    if victims.MISSING is not None:
        return Finding(
            "victims",
            "worse",
            f"{victims.MISSING}: a failure of many processes takes about three times as long",
            "apt-get install gcc; pip install --force-reinstall --no-deps daxemu",
        )
    return Finding("victims", "ok", "loaded")


def _shared_memory() -> Finding:
    if not os.access(SHARED, os.W_OK):
        return Finding(
            "shared memory",
            "worse",
            f"{SHARED} cannot be written to",
            "make devices on a disk, or mount a tmpfs",
        )
    free = shutil.disk_usage(SHARED).free
    if free < MIN_SHARED:
        return Finding(
            "shared memory",
            "worse",
            f"{free >> 20} MiB free in {SHARED}; a device takes as much as is used of it",
            f"mount -o remount,size=50% {SHARED} (as root); in a container: --shm-size",
        )
    return Finding("shared memory", "ok", f"{free >> 20} MiB free in {SHARED}")


def _tracing() -> Finding:
    scope = int(PTRACE_SCOPE.read_text()) if PTRACE_SCOPE.exists() else 0
    if scope == 0 or (scope < 3 and capable("self", CAP_SYS_PTRACE)):
        return Finding("ptrace", "ok", f"scope {scope}: signals are exact")
    return Finding(
        "ptrace",
        "worse",
        f"scope {scope} ({PTRACE_SCOPE}) keeps us out of other processes: their SIGBUS has no exact code",
        "sysctl kernel.yama.ptrace_scope=0 (as root)" + ("; 3 needs a reboot first" if scope == 3 else ""),
    )


def _abort() -> Finding:
    # Root's supervisor mounts fusectl at need (session.abort_file).
    if os.path.ismount(CONNECTIONS) or (CONNECTIONS.is_dir() and os.geteuid() == 0):
        return Finding("fusectl", "ok", f"{CONNECTIONS} can cut a mount that hangs")
    return Finding(
        "fusectl",
        "worse",
        f"{CONNECTIONS} is not mounted: no powerfail, and a mount that hangs can be cut by root only",
        f"mount -t fusectl none {CONNECTIONS} (as root)",
    )


def _kernel() -> Finding:
    release, machine = platform.release(), platform.machine()
    version = tuple(int(number) for number in re.findall(r"\d+", release)[:2])
    if version < (5, 15):
        return Finding("kernel", "worse", f"{release}: not tried before 5.15", "use a newer kernel")
    if machine != "x86_64":
        return Finding(
            "kernel",
            "worse",
            f"{release} on {machine}: no signal for a thread that blocks SIGBUS",
            "use x86_64",
        )
    return Finding("kernel", "ok", f"{release} on {machine}")


def _presence() -> Finding:
    try:
        with Pagemap("self") as pagemap:
            works = pagemap.can_scan()
    except OSError as error:
        return Finding(
            "pagemap",
            "worse",
            f"/proc/self/pagemap: {error.strerror}: no process gets a signal early",
            "mount /proc",
        )
    if not works:
        return Finding(
            "pagemap",
            "worse",
            "no PAGEMAP_SCAN (Linux 6.7): to find who has a page takes longer",
            "use Linux 6.7",
        )
    return Finding("pagemap", "ok", "PAGEMAP_SCAN works")


def _seccomp() -> Finding:
    code = "from daxemu.host.run.seccomp import install; install()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        found = (done.stderr.strip().splitlines() or ["killed"])[-1]
        return Finding(
            "seccomp",
            "worse",
            f"no user notification, so no daxemu run: {found}",
            "use Linux 5.19; in a container: --security-opt seccomp=unconfined",
        )
    return Finding("seccomp", "ok", "user notification works: daxemu run can")


def direct_mappings() -> Finding:
    """Return the finding about direct mappings alone."""
    return _direct(_seccomp())


def _direct(seccomp: Finding) -> Finding:
    """Return the finding about direct mappings. ``seccomp``: the finding about user notification."""
    from daxemu.host import direct_needs

    lacking = list(direct_needs.missing())
    if lacking:
        found = "; ".join(what for what, _ in lacking)
        fixes = "; ".join(fix for _, fix in lacking)
        return Finding("direct mappings", "worse", f"{found}: no daxemu mount --direct", fixes)
    if seccomp.verdict != "ok":
        found = "daxemu mount --direct can, but without daxemu run no program has a direct mapping"
        return Finding("direct mappings", "worse", found, seccomp.mend)
    return Finding("direct mappings", "ok", "daxemu mount --direct can")


def _stale(answers: Answers) -> Iterator[Finding]:
    found = mounts()
    wrong = 0
    for mount in found:
        where = printable(mount.mountpoint)
        try:
            answers(mount)
        except NotMounted:
            what = "its supervisor is dead"
        except Busy:
            what = "its supervisor hangs"
        except PermissionDenied:
            continue  # only the mount's owner may ask its supervisor
        else:
            continue
        wrong += 1
        yield Finding("mounts", "worse", f"{where}: {what}", f"daxemu umount --force {where}")
    if not wrong:
        yield Finding("mounts", "ok", f"{len(found)} daxemu mounts, none stale")
