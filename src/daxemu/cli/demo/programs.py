"""Compile and drive the programs of the demo: ordinary processes that read and write lines."""

from __future__ import annotations

import select
import subprocess
from importlib import resources
from pathlib import Path

from daxemu.errors import DaxemuError

PATIENCE = 20.0
"""Limit in seconds of the wait for a line. A program that takes longer hangs, which is a defect of daxemu."""


def compile_program(name: str, directory: Path) -> None:
    """Compile NAME.c of this package to DIRECTORY/NAME."""
    source = resources.files("daxemu.cli.demo") / f"{name}.c"
    with resources.as_file(source) as path:
        subprocess.run(["gcc", "-O1", "-o", directory / name, path], check=True)


class Program:
    """A process with line-wise input and output. A context manager: the process ends with the block."""

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
        """True while the process runs."""
        return self._process.poll() is None

    def write(self, line: str) -> None:
        """Write a line to the standard input of the process."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")

    def close_input(self) -> None:
        """Close the standard input of the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def read_line(self) -> str:
        """Return the next line of output; empty at the end. Raises DaxemuError after PATIENCE seconds."""
        assert self._process.stdout is not None
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
            if not ready:
                raise DaxemuError(f"process {self.pid} wrote no line for {PATIENCE:.0f} s")
            chunk = self._process.stdout.read(4096)
            if not chunk:
                return ""
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode(errors="backslashreplace")

    def read_until(self, wanted: str) -> None:
        """Skip lines up to ``wanted``. Raises DaxemuError if the output ends before."""
        while (line := self.read_line()) != wanted:
            if not line:
                raise DaxemuError(f"process {self.pid} ended before it wrote {wanted!r}")

    def wait(self) -> int:
        """Wait for the end. Return the exit status, or minus the number of the signal that killed the
        process.
        """
        return self._process.wait(PATIENCE)
