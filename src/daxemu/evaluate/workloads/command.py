"""Command workload: any command line. The ``verify`` command judges the data."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from typing import Literal

from daxemu.evaluate.workloads.base import Mismatch, Workload, ino_of

PATIENCE = 60.0


class CommandFailed(Exception):
    """A command ended with exit status != 0."""


class CommandRun(Workload):
    """Run of specs.Command. One operation is one run of the command."""

    failures = (OSError, CommandFailed, subprocess.TimeoutExpired)

    def prepare(self) -> None:
        if self.spec.prepare:
            done = self._run(self.spec.prepare)
            if done.returncode:
                raise CommandFailed(f"prepare: exit {done.returncode}: {done.stderr.strip()[-200:]}")

    def open(self) -> None:
        """Do nothing: the command opens its own files."""

    def step(self, rng: random.Random) -> int:
        done = self._run(self.spec.command)
        if done.returncode:
            raise CommandFailed(f"exit {done.returncode}: {done.stderr.strip()[-200:]}")
        return 0

    def check(self) -> Iterator[Mismatch]:
        if not self.spec.verify:
            return
        done = self._run(self.spec.verify)
        named = False
        for line in done.stdout.splitlines():
            word, _, rest = line.partition(" ")
            if word not in ("lost", "wrong"):
                continue
            path, offset, length = rest.rsplit(None, 2)
            state: Literal["unreadable", "wrong"] = "unreadable" if word == "lost" else "wrong"
            named = True
            yield Mismatch(path, ino_of(self.root / path), int(offset), int(length), state)
        if done.returncode and not named:
            yield Mismatch("", 0, -1, 0, "wrong")

    def size(self) -> int:
        return sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())

    def _run(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "-c", command],
            cwd=self.root,
            env={**os.environ, "DAXEMU_DIR": str(self.root), "DAXEMU_STATE": str(self.state)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=PATIENCE,
        )
