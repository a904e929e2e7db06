"""Driver of tests/victims/racer.c: processes that race against memory failures, and their record of
signals.
"""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

from tests.support.actor import compile_victim
from tests.support.mount import DaxMount

KINDS = (
    "truncate", "unlink", "clone", "cow", "rename", "exec", "exit", "fork", "munmap", "replace", "remap",
    "threads", "io",
)  # fmt: skip
PATIENCE = 20.0
"""Seconds for any answer. None takes one: longer is a hang."""


class Hang(AssertionError):
    """A process did not answer in time."""


class Place(NamedTuple):
    """Present or past content of an address in a racer. ``touched``: some page of the mapping was touched."""

    file: str
    page: int
    live: bool
    touched: bool


class Seen(NamedTuple):
    """Signal as the racer saw it. ``sync``: raised by an access of the thread."""

    pid: int
    tid: int
    signo: int
    code: int
    address: int
    lsb: int
    sync: bool
    places: tuple[Place, ...]


class PageRead(NamedTuple):
    """Content read from a mapped page by a parked racer: a byte, or the code, lsb and address of the
    fault.
    """

    file: str
    ino: int
    page: int
    address: int
    byte: str | None
    fault: tuple[int, int, int] | None


class Racer:
    """One racer. A context manager: the racer does not outlive the block."""

    def __init__(
        self, kind: str, seed: int, mount: DaxMount, signals: Path, *, lenient: bool = False
    ) -> None:
        self.kind = kind
        self.rounds = 0
        self.wrongs: list[str] = []
        self._signals = signals
        self._read = 0
        self._rest = b""
        argv = [
            *mount.wrapper,
            str(compile_victim("racer")),
            kind,
            str(seed),
            str(signals),
            *(["lenient"] if lenient else []),
        ]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=mount.path, bufsize=0
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait(PATIENCE)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def say(self, word: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(word.encode() + b"\n")
        except BrokenPipeError:
            status = self._process.wait(PATIENCE)
            last = self._signals.read_text().splitlines()[-1:] if self._signals.exists() else []
            raise AssertionError(f"{self.kind} (pid {self.pid}) ended with {status}: {last}") from None

    def parked(self) -> None:
        """After ``say("park")``: wait until the racer's round is over."""
        (_, rounds), _ = self._answer("parked")
        self.rounds = int(rounds)

    def verify(self) -> list[PageRead]:
        """Read every page of all mappings. Precondition: parked."""
        self.say("verify")
        _, before = self._answer("verified")
        return [_page_read(words) for words in before]

    def end(self) -> int:
        """End the racer; return the exit status."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            return self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise Hang(f"{self.kind} (pid {self.pid}) does not end") from error

    def seen(self) -> Iterator[Seen]:
        """Return the signals to the racer and its children since the last call."""
        if not self._signals.exists():
            return
        with self._signals.open("rb") as file:
            file.seek(self._read)
            whole, end, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + len(end)
        for line in whole.splitlines():
            yield _seen(line.decode().split())

    def _answer(self, last: str) -> tuple[list[str], list[list[str]]]:
        """Return the words of the line that begins with ``last``, and of the lines before."""
        deadline = time.monotonic() + PATIENCE
        before: list[list[str]] = []
        while True:
            words = self._line(deadline).split()
            if words[0] == last:
                return words, before
            if words[0] == "wrong":
                self.wrongs.append(f"{self.kind}: {' '.join(words[1:])}")
            else:
                before.append(words)

    def _line(self, deadline: float) -> str:
        assert self._process.stdout is not None
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise Hang(f"{self.kind} (pid {self.pid}) does not answer")
            chunk = os.read(self._process.stdout.fileno(), 1 << 16)
            assert chunk, f"{self.kind} (pid {self.pid}) ended with {self._process.wait(PATIENCE)}"
            self._rest += chunk
        line, self._rest = self._rest.split(b"\n", 1)
        return line.decode()


def _seen(words: list[str]) -> Seen:
    pid, tid, signo, code, address, lsb, sync, *places = words
    return Seen(
        int(pid), int(tid), int(signo), int(code), _address(address), int(lsb), sync == "1",
        tuple(map(_place, places)),
    )  # fmt: skip


def _address(word: str) -> int:
    return 0 if word == "(nil)" else int(word, 16)


def _place(word: str) -> Place:
    file, page, live, touched = word.split(":")
    return Place(file, int(page), live == "1", touched == "1")


def _page_read(words: list[str]) -> PageRead:
    _, file, ino, page, address, *result = words
    byte = result[0] if len(result) == 1 else None
    fault = (int(result[0]), int(result[1]), _address(result[2])) if len(result) == 3 else None
    return PageRead(file, int(ino), int(page), _address(address), byte, fault)
