"""Mixed work for as long as one likes (DAXEMU_SOAK seconds; `make soak`): the supervisor does not grow."""

from __future__ import annotations

import os
import random
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from daxemu.client import Client
from daxemu.errors import DaxemuError
from daxemu.supervisor.event_log import KEPT
from tests.support.actor import Actor
from tests.support.mount import DaxMount

SECONDS = float(os.environ.get("DAXEMU_SOAK", "5"))
PAGE, PAGES, NAMES = 4096, 64, 200
MAPPERS = 3
EVENT_BYTES = 600  # bytes of one event in memory, at most
SLACK = (256 if os.environ.get("DAXEMU_ASAN") else 8) << 20
"""Bytes that the supervisor may grow. AddressSanitizer keeps 256 MiB of freed memory (quarantine_size_mb)."""

pytestmark = [pytest.mark.mount, pytest.mark.timeout(SECONDS * 2 + 120)]


class Work:
    """Random steps, one after another, on files in constant change."""

    def __init__(self, mount: DaxMount, client: Client, mappers: list[Actor]) -> None:
        self._mount, self._client, self._mappers = mount, client, mappers
        self._rng = random.Random(1)
        self.steps = 0

    def _some(self) -> Path:
        return self._mount.path / f"f{self._rng.randrange(NAMES)}"

    def step(self) -> None:
        """Do one step; an error is accepted where a poisoned page or a missing name explains the error."""
        self.steps += 1
        verb = self._rng.choice(
            (self.write, self.write, self.read, self.rename, self.unlink, self.clone, self.fail, self.map)
        )
        try:
            verb()
        except (OSError, DaxemuError):
            return

    def write(self) -> None:
        with open(self._some(), "r+b" if self._rng.random() < 0.5 else "wb") as file:
            file.seek(self._rng.randrange(4) * PAGE)
            file.write(bytes(self._rng.randrange(1, PAGES * PAGE)))
            if self._rng.random() < 0.1:
                os.fsync(file.fileno())

    def read(self) -> None:
        self._some().read_bytes()

    def rename(self) -> None:
        self._some().rename(self._some())

    def unlink(self) -> None:
        self._some().unlink()

    def clone(self) -> None:
        source, target = self._some(), self._some()
        target.touch()
        self._client.request("reflink", src=source.stat().st_ino, dst=target.stat().st_ino)

    def fail(self) -> None:
        found = self._some().stat()
        whole = [[0, found.st_size]]
        at = self._rng.randrange(max(1, found.st_size // PAGE)) * PAGE
        latent = self._rng.random() < 0.2
        self._client.request("inject", ino=found.st_ino, ranges=[[at, PAGE]], latent=latent)
        self._client.request("clear", ino=found.st_ino, ranges=whole)

    def map(self) -> None:
        mapper, file = self._rng.choice(self._mappers), self._some()
        if not file.exists():
            return
        mapper.cmd("munmap 0")
        mapper.cmd("close 0")
        mapper.cmd(f"open 0 {file.name} rw")
        mapper.cmd(f"mmap 0 0 0 {PAGES} shared")
        for _ in range(4):
            page = self._rng.randrange(PAGES)
            mapper.cmd(self._rng.choice((f"tr 0 {page}", f"tw 0 {page} x")))

    def footprint(self) -> tuple[int, int]:
        """Return the private bytes of the supervisor, and the number of its events in memory."""
        status = self._client.request("status")
        _, resident, of_files, *_ = map(int, Path(f"/proc/{status['pid']}/statm").read_text().split())
        return (resident - of_files) * PAGE, min(KEPT, status["events"])


def test_mixed_work_does_not_make_the_supervisor_grow(dax_mount: DaxMount) -> None:
    made = dax_mount
    with made.client() as client, ExitStack() as stack:
        spawn = partial(Actor.spawn, cwd=made.path, wrapper=made.wrapper)
        mappers = [stack.enter_context(spawn(f"p{i}")) for i in range(MAPPERS)]
        made.make_file("f0", PAGES)
        for mapper in mappers:
            for command in ("mcekill early", "open 0 f0 rw", f"mmap 0 0 0 {PAGES} shared"):
                mapper.cmd(command)
        work = Work(made, client, mappers)
        began = time.monotonic()
        while time.monotonic() < began + SECONDS / 3:
            work.step()
        warm, kept = work.footprint()
        warm_steps = work.steps
        while time.monotonic() < began + SECONDS:
            work.step()
        end, kept_at_end = work.footprint()
        print(
            f"{work.steps} steps, {work.steps - warm_steps} of them measured: "
            f"{warm / 1e6:.1f} MB, then {end / 1e6:.1f} MB; {kept_at_end - kept} events more are kept"
        )
        assert work.steps > 100
        assert client.request("who_maps")["mapped"]
        assert end - warm < SLACK + (kept_at_end - kept) * EVENT_BYTES
