"""/proc/PID/stat: one line of fields (proc_pid_stat(5)).

Field 2, the name, may hold any byte but NUL: spaces, parentheses, newlines. The other fields begin after the
last closing parenthesis.
"""

from __future__ import annotations

from typing import NamedTuple

from daxemu.host.proc.procfs import cut_short, read_whole

_STATE, _PPID, _FLAGS, _MINOR_FAULTS, _MAJOR_FAULTS, _THREADS = 0, 1, 6, 7, 9, 17  # after the name
_LEAST = _THREADS + 1


class ThreadStat(NamedTuple):
    """Line of a process or a thread. A property converts its field when read: a failure reads thousands."""

    fields: tuple[bytes, ...] | list[bytes]
    """Fields from the state on."""

    @property
    def state(self) -> str:
        """Letter of the kernel: R, S, D, T, t, Z, X, I."""
        return chr(self.fields[_STATE][0])

    @property
    def nr_threads(self) -> int:
        """Number of threads of the process."""
        return int(self.fields[_THREADS])

    @property
    def parent(self) -> int:
        """Process id of the parent."""
        return int(self.fields[_PPID])

    @property
    def flags(self) -> int:
        """``task->flags``: PF_* bits."""
        return int(self.fields[_FLAGS])

    @property
    def faults(self) -> tuple[bytes, bytes]:
        """Numbers of minor and major page faults, to be compared only."""
        return self.fields[_MINOR_FAULTS], self.fields[_MAJOR_FAULTS]

    @property
    def is_dead(self) -> bool:
        """The thread is a zombie, or past that state."""
        return self.state in "ZX"


def parse(raw: bytes) -> ThreadStat:
    """Parse the line. Raises ProcessLookupError where fields are missing."""
    fields = raw.rpartition(b") ")[2].split()
    if len(fields) < _LEAST or raw[-1:] != b"\n":
        raise cut_short("stat")
    return ThreadStat(fields)


def read(pid: int | str) -> ThreadStat:
    """Read the line of a process (or of a thread, by its own id).

    Raises FileNotFoundError or ProcessLookupError where the process is gone, PermissionError where /proc
    hides the process.
    """
    return parse(read_whole(f"/proc/{pid}/stat"))
