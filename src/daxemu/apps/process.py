"""Process of a program: input and output by lines; every wait has a time limit."""

from __future__ import annotations

import os
import resource
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from daxemu.host.proc import stat
from daxemu.host.proc.procfs import pids

KILL_PATIENCE = 3.0
"""Seconds to wait for a killed process. A process blocked on the mount ends only after the mount is cut."""


class Ended(Exception):
    """A program ended while it was expected to go on. ``status``: exit status, or minus the signal."""

    def __init__(self, status: int) -> None:
        super().__init__(describe(status))
        self.status = status


class TimedOut(Exception):
    """No output or no end within the limit."""


def describe(status: int) -> str:
    """Return an exit status as text."""
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def no_core() -> None:
    """Disable core files. Runs in the child: a death by SIGBUS leaves no core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class Process:
    """Running process. ``limit``: seconds for each wait.

    ``output``: all lines of stdout and stderr so far; ``errors``: lines of stderr alone.
    """

    def __init__(self, argv: Sequence[str], limit: float, cwd: Path, env: dict[str, str]) -> None:
        self.limit = limit
        self.output: list[str] = []
        self.errors: list[str] = []
        self._taken = 0
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd=cwd,
            env=env,
            start_new_session=True,
            preexec_fn=no_core,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        # stderr first: an error message precedes the output printed after the error.
        self._rest = {self._process.stderr: b"", self._process.stdout: b""}
        self.pid = self._process.pid

    @property
    def status(self) -> int | None:
        """Return the exit status, or minus the signal; None while the process runs."""
        return self._process.poll()

    def send(self, text: str) -> None:
        """Write lines to stdin, and collect output meanwhile. Raises Ended, TimedOut."""
        assert self._process.stdin is not None
        deadline = time.monotonic() + self.limit
        stdin = self._process.stdin.fileno()
        left = text.encode()
        while left:
            left_seconds = max(deadline - time.monotonic(), 0.0)
            readable, writable, _ = select.select(list(self._rest), [stdin], [], left_seconds)
            if not readable and not writable:
                raise TimedOut(f"no input accepted for {self.limit:g} s")
            if readable:
                self._read(deadline)
            if writable:
                try:
                    left = left[os.write(stdin, left) :]
                except BrokenPipeError:
                    raise Ended(self.wait()) from None

    def until(self, *wanted: str) -> list[str]:
        """Return new lines up to and including the first with any of ``wanted`` in it.

        Raises Ended, TimedOut.
        """
        deadline = time.monotonic() + self.limit
        at = self._taken
        while True:
            while at < len(self.output):
                at += 1
                if any(word in self.output[at - 1] for word in wanted):
                    return self._take(at)
            self._more(deadline)

    def lines(self, count: int) -> list[str]:
        """Return the next ``count`` lines. Raises Ended, TimedOut."""
        deadline = time.monotonic() + self.limit
        while len(self.output) < self._taken + count:
            self._more(deadline)
        return self._take(self._taken + count)

    def _take(self, until: int) -> list[str]:
        taken, self._taken = self.output[self._taken : until], until
        return taken

    def _more(self, deadline: float) -> None:
        if not self._read(deadline):
            raise Ended(self.wait())

    def _read(self, deadline: float) -> bool:
        """Collect available output. Return False at the end of all output. Raises TimedOut."""
        if not self._rest:
            return False
        ready, _, _ = select.select(list(self._rest), [], [], max(deadline - time.monotonic(), 0.0))
        if not ready:
            raise TimedOut(f"no output for {self.limit:g} s")
        for stream in [each for each in self._rest if each in ready]:
            chunk = stream.read(1 << 18)
            *whole, rest = (self._rest[stream] + chunk).split(b"\n")
            self._rest[stream] = rest
            if not chunk:
                whole += [rest] if rest else []
                del self._rest[stream]
                stream.close()
            lines = [line.decode(errors="backslashreplace").rstrip("\r") for line in whole]
            self.output += lines
            if stream is self._process.stderr:
                self.errors += lines
        return bool(self._rest)

    def end(self) -> int:
        """Close stdin and wait for the end. Return the exit status, or minus the signal. Raises TimedOut."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self.wait()

    def ask_to_end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, then wait for the end. Return the exit status, or minus a signal.

        Raises TimedOut.
        """
        if self.status is None:
            self._process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Read all output, then wait for the end. Return the exit status, or minus a signal.

        Raises TimedOut.
        """
        deadline = time.monotonic() + self.limit
        while self._read(deadline):
            pass
        try:
            return self._process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired as error:
            raise TimedOut(f"does not end within {self.limit:g} s") from error

    def ends_within(self, seconds: float) -> bool:
        """Return True if the process ends by itself within ``seconds``."""
        try:
            process = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            ended, _, _ = select.select([process], [], [], seconds)
        finally:
            os.close(process)
        return bool(ended)

    def kill(self) -> bool:
        """Kill the process and its descendants. Return False if the process remains after KILL_PATIENCE."""
        tree = [self.pid, *_descendants(self.pid)]
        for pid in tree:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            self._process.wait(KILL_PATIENCE)
        except subprocess.TimeoutExpired:
            return False
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
        self._rest.clear()
        return True


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for pid, parent in _parents():
        children.setdefault(parent, []).append(pid)
    found, left = [], [root]
    while left:
        mine = children.get(left.pop(), [])
        found += mine
        left += mine
    return found


def _parents() -> Iterator[tuple[int, int]]:
    for pid in pids():
        try:
            yield pid, stat.read(pid).parent
        except OSError:
            continue  # the process ended meanwhile
