"""Program on a terminal of a given size; tests read the screen as a person would."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from typing import Self

import pyte

PATIENCE = 30.0


class Terminal:
    """A context manager around a program, which must end by itself."""

    def __init__(self, command: Sequence[str], columns: int, rows: int) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
        plain = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env={**plain, "TERM": "xterm-256color"}
        )
        os.close(theirs)
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    @property
    def lines(self) -> list[str]:
        """Return the lines on the screen."""
        return list(self._screen.display)

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._ours, keys.encode())

    def wait_for(self, text: str) -> None:
        """Wait until ``text`` is somewhere on the screen."""
        self._wait(lambda: text in "\n".join(self.lines), repr(text))

    def wait_for_not(self, text: str) -> None:
        """Wait until ``text`` is nowhere on the screen."""
        self._wait(lambda: text not in "\n".join(self.lines), f"the end of {text!r}")

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not done():
            going_on = time.monotonic() < deadline and self._read(deadline)
            assert going_on or done(), f"{what} did not come\n" + "\n".join(self.lines)

    def end(self) -> int:
        """Read until the program ends; return its exit status."""
        deadline = time.monotonic() + PATIENCE
        while self._read(deadline):
            pass
        return self.process.wait(PATIENCE)

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, "it says nothing more\n" + "\n".join(self.lines)
        try:
            self._stream.feed(os.read(self._ours, 1 << 16))
        except OSError:
            return False  # EIO: the other end is closed
        return True
