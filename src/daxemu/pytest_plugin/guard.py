"""A process that ends tests which hang: ``python -m daxemu.pytest_plugin.guard PID`` guards pytest's process.

It must be another one: a load of poison whose SIGBUS handler returns is repeated for ever, and no thread of
Python's runs meanwhile. From the mildest means to the last: the test is interrupted; poison is healed, which
ends that loop; the mount is cut, for a request in the kernel waits even for those who are killed; the process
is killed.

It reads ``{"limit", "device", "mountpoint"}`` when a test begins and ``done`` when it ends, which it answers
with ``{}``; before it interrupts it writes ``{"reason"}``.
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
"""Seconds that each means has to work."""
INTERRUPT = signal.SIGRTMAX - 1
CODE = "from daxemu.pytest_plugin.guard import guard; guard({pid})"


class _Hang:
    """A test that takes too long."""

    def __init__(self, pid: int, watched: dict[str, Any]) -> None:
        self.limit = float(watched["limit"])
        self._pid = pid
        self._device = Path(watched["device"])
        self._mountpoint = Path(watched["mountpoint"])
        self._reason = ""

    def means(self) -> list[Callable[[], None]]:
        """From the mildest to the last."""
        return [self._interrupt, self._heal, self._cut, self._kill]

    def _interrupt(self) -> None:
        self._reason = self._why()
        _answer({"reason": self._reason})
        os.kill(self._pid, INTERRUPT)

    def _heal(self) -> None:
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
        """What can be known without touching the mount."""
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


class _StdinLines:
    """Lines of stdin, waited for with a limit."""

    def __init__(self) -> None:
        self._buffer = b""

    def wait(self, limit: float | None) -> bool:
        """Whether there is a line, or the end, within ``limit`` seconds."""
        return b"\n" in self._buffer or bool(select.select([0], [], [], limit)[0])

    def read(self) -> bytes:
        """The next line; nothing at the end."""
        while b"\n" not in self._buffer:
            if not (more := os.read(0, 1 << 16)):
                return b""
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def guard(pid: int) -> None:
    """Guard until stdin ends."""
    lines = _StdinLines()
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
