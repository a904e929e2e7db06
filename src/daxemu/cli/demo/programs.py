"""Compiling and driving the demo's programs: ordinary processes, talked to by lines."""

from __future__ import annotations

import select
import subprocess
from importlib import resources
from pathlib import Path

from daxemu.errors import DaxemuError

PATIENCE = 20.0
"""Seconds to wait for a line. What takes longer hangs, and that would be a fault of ours."""


def compile_program(name: str, directory: Path) -> None:
    """Compile NAME.c of this package to DIRECTORY/NAME."""
    source = resources.files("daxemu.cli.demo") / f"{name}.c"
    with resources.as_file(source) as path:
        subprocess.run(["gcc", "-O1", "-o", directory / name, path], check=True)


class Program:
    """A process with line-wise input and output. A context manager: it ends with the block."""

    def __init__(self, argv: list[str]) -> None:
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
        )
        self._buffer = b""
        self.pid = self._process.pid

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    @property
    def alive(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def write(self, line: str) -> None:
        """Give it a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")

    def close_input(self) -> None:
        """End of its input."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def read_line(self) -> str:
        """Its next line; empty at its end. Raises DaxemuError when none comes."""
        assert self._process.stdout is not None
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
            if not ready:
                raise DaxemuError(f"process {self.pid} says nothing for {PATIENCE:.0f} s")
            chunk = self._process.stdout.read(4096)
            if not chunk:
                return ""
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode(errors="backslashreplace")

    def read_until(self, wanted: str) -> None:
        """Skip lines up to ``wanted``. Raises DaxemuError if it never comes."""
        while (line := self.read_line()) != wanted:
            if not line:
                raise DaxemuError(f"process {self.pid} ended without saying {wanted!r}")

    def wait(self) -> int:
        """How it ended: its exit status, or minus the signal."""
        return self._process.wait(PATIENCE)
