"""Guard: a process that ends hung tests. ``python -m daxemu.pytest_plugin.guard PID`` guards a pytest
process.

The guard must be a separate process: a load of poison whose SIGBUS handler returns is repeated for ever, and
no Python thread of the test process runs meanwhile. The guard uses these means, one after another:

1. interrupt the test;
2. clear all poison, which ends such a loop;
3. cut the mount, because a request in the kernel waits even in a killed process;
4. kill the process.

The guard reads ``{"limit", "device", "mountpoint"}`` at the begin of a test and ``done`` at the end, and
answers ``done`` with ``{}``. Before the interruption the guard writes ``{"reason"}``.
"""

from __future__ import annotations

import json
import os
import select
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

GRACE = 2.0
"""Seconds after which the guard uses the next means."""
INTERRUPT = signal.SIGRTMAX - 1
CODE = "from daxemu.pytest_plugin.guard import guard; guard({pid})"


class _Hang:
    """Test beyond its time limit."""

    def __init__(self, pid: int, watched: dict[str, Any]) -> None:
        self.limit = float(watched["limit"])
        self._pid = pid
        self._device = Path(watched["device"])
        self._mountpoint = Path(watched["mountpoint"])
        self._reason = ""

    def means(self) -> list[Callable[[], None]]:
        """Return the means, in the order of their use."""
        return [self._interrupt, self._clear_poison, self._cut, self._kill]

    def _interrupt(self) -> None:
        self._reason = self._why()
        _answer({"reason": self._reason})
        os.kill(self._pid, INTERRUPT)

    def _clear_poison(self) -> None:
        from daxemu.client import Client
        from daxemu.errors import DaxemuError

        with suppress(DaxemuError), Client.at(self._mountpoint, patience=GRACE) as client:
            client.request("clear", ranges=[[0, client.request("status")["size"]]])

    def _cut(self) -> None:
        from daxemu.host.fuse.session import abort_connection
        from daxemu.host.proc.mountinfo import mount_at

        if (there := mount_at(self._mountpoint)) is not None:
            abort_connection(there)

    def _kill(self) -> None:
        last_words = f"\n{self._reason}\nIt could not be ended alone: pytest is killed.\n"
        os.write(2, last_words.encode())
        os.kill(self._pid, signal.SIGKILL)

    def _why(self) -> str:
        """Describe the hang without access to the mount."""
        from daxemu.errors import DaxemuError
        from daxemu.events import decode
        from daxemu.pmem.device_dir import DeviceDir
        from daxemu.pmem.event_files import events_of
        from daxemu.text import for_people

        lines = [f"the test hung: it took more than {self.limit:g} s (dax_timeout) on {self._mountpoint}"]
        with suppress(OSError, IndexError, DaxemuError):
            last = list(events_of(DeviceDir.look(self._device)))[-1]
            lines.append(f"last event: {decode(last).summary()}")
        return "\n".join(map(for_people, lines + self._users()))

    def _users(self) -> list[str]:
        from daxemu.host.proc.mountinfo import mount_at
        from daxemu.host.proc.present import collect_tasks, mapped_runs

        if (there := mount_at(self._mountpoint)) is None:
            return ["nothing is mounted there any more"]
        return [
            f"{task.comm} (pid {task.pid}, state {_state(task.pid)}) has files of it mapped"
            for task in collect_tasks(there.dev, None, pages_of=mapped_runs)
        ]


class _InputLines:
    """Lines of stdin, with a time limit for each wait."""

    def __init__(self) -> None:
        self._buffer = b""

    def wait(self, limit: float | None) -> bool:
        """Wait for a line or the end. Return False after ``limit`` seconds."""
        return b"\n" in self._buffer or bool(select.select([0], [], [], limit)[0])

    def read(self) -> bytes:
        """Return the next line; empty at the end."""
        while b"\n" not in self._buffer:
            if not (more := os.read(0, 1 << 16)):
                return b""
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def guard(pid: int) -> None:
    """Guard until stdin ends."""
    lines = _InputLines()
    while begun := lines.read():
        hang = _Hang(pid, json.loads(begun))
        limit = hang.limit
        for means in hang.means():
            if lines.wait(limit):
                break
            means()
            limit = GRACE
        if not lines.read():
            return
        _answer({})


def _answer(message: dict[str, str]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


def _state(pid: int) -> str:
    from daxemu.host.proc import stat

    try:
        return stat.read(pid).state
    except OSError:
        return "gone"
