"""/proc/PID/status: lines ``Name: value`` (proc_pid_status(5)).

The name of the process comes first. The kernel escapes a newline in the name, so no name can pass for another
line.
"""

from __future__ import annotations

from typing import NamedTuple

from daxemu.host.proc.procfs import cut_short, read_whole


class ThreadStatus(NamedTuple):
    """Text of a process or a thread. A property parses its line only when read.

    Properties raise ProcessLookupError where the text ends before their line. Signal masks have bit N-1 for
    signal N.
    """

    raw: bytes

    @property
    def name(self) -> str:
        """Name of the thread, with the kernel's escapes of newline and backslash."""
        return self._value(b"Name").decode(errors="backslashreplace")

    @property
    def state(self) -> str:
        """Letter of the kernel: R, S, D, T, t, Z, X, I."""
        return chr(self._value(b"State")[0])

    @property
    def is_dead(self) -> bool:
        """The thread is a zombie: the leader of a thread group may be one long before its process ends."""
        return self.state in "ZX"

    @property
    def tid(self) -> int:
        """Thread id."""
        return int(self._value(b"Pid"))

    @property
    def tgid(self) -> int:
        """Process id of the thread's process."""
        return int(self._value(b"Tgid"))

    @property
    def tracer(self) -> int:
        """Thread id of the tracer; 0 if none."""
        return int(self._value(b"TracerPid"))

    @property
    def ns_tgid(self) -> int:
        """Process id in the innermost pid namespace of the thread."""
        return int((self._find(b"NStgid") or self._value(b"Tgid")).split()[-1])

    @property
    def ns_tid(self) -> int:
        """Thread id in the innermost pid namespace of the thread."""
        return int((self._find(b"NSpid") or self._value(b"Pid")).split()[-1])

    @property
    def euid(self) -> int:
        """Effective user id."""
        return int(self._value(b"Uid").split()[1])

    @property
    def groups(self) -> list[int]:
        """Group id for file access (fsgid), then the supplementary group ids."""
        return [int(self._value(b"Gid").split()[3]), *map(int, self._value(b"Groups").split())]

    @property
    def pending(self) -> int:
        """Mask of signals queued for the thread itself."""
        return int(self._value(b"SigPnd"), 16)

    @property
    def blocked(self) -> int:
        """Mask of blocked signals."""
        return int(self._value(b"SigBlk"), 16)

    @property
    def ignored(self) -> int:
        """Mask of ignored signals."""
        return int(self._value(b"SigIgn"), 16)

    @property
    def seccomp(self) -> int:
        """Mode of seccomp(2): 0 none, 1 strict, 2 filter; 0 also for a kernel without seccomp."""
        return int(self._find(b"Seccomp") or b"0")

    @property
    def seccomp_filters(self) -> int:
        """Number of seccomp(2) filters; 0 also for a kernel before 5.9."""
        return int(self._find(b"Seccomp_filters") or b"0")

    def has_capability(self, capability: int) -> bool:
        """Return whether the thread has a capability (CAP_*) in its effective set."""
        return bool(int(self._value(b"CapEff"), 16) >> capability & 1)

    def _find(self, field: bytes) -> bytes | None:
        """Value of the first line with this name; None if no line has it."""
        key = b"%b:\t" % field
        start = 0 if self.raw.startswith(key) else self.raw.find(b"\n" + key) + 1
        end = self.raw.find(b"\n", start)
        return self.raw[start + len(key) : end] if start or self.raw.startswith(key) else None

    def _value(self, field: bytes) -> bytes:
        value = self._find(field)
        if value is None:
            raise cut_short("status")
        return value


def parse(raw: bytes) -> ThreadStatus:
    """Take the text as a value. Raises ProcessLookupError where the last line is not whole."""
    if raw[-1:] != b"\n":
        raise cut_short("status")
    return ThreadStatus(raw)


def read(pid: int | str) -> ThreadStatus:
    """Read the text of a process (or of a thread, by its own id).

    Raises FileNotFoundError or ProcessLookupError where the process is gone, PermissionError where /proc
    hides the process.
    """
    return parse(read_whole(f"/proc/{pid}/status"))


def find(pid: int) -> ThreadStatus | None:
    """Read the text of a process or thread; None for a dead one. Raises PermissionError as :func:`read`."""
    try:
        return read(pid)
    except (FileNotFoundError, ProcessLookupError):
        return None
