"""Crashes at random moments of a random workload: always sound, always what fsync promised, nothing else.

DAXEMU_CRASH_ROUNDS says how many (``make soak``: thousands), DAXEMU_CRASH_SEED which; a failure names the
seed of its round, which DAXEMU_CRASH_SEED with DAXEMU_CRASH_ROUNDS=1 runs again, if at another moment.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import pytest

from daxemu.errors import DaxemuError
from tests.support.aftermath import Tree, look, why_not
from tests.support.quick import QuickMount
from tests.support.workload import COUNTERS, history
from tests.support.zygote import wait_for_death, wait_for_end

ROUNDS = int(os.environ.get("DAXEMU_CRASH_ROUNDS", "200"))
SEED = int(os.environ.get("DAXEMU_CRASH_SEED", "1"))
LENGTH = 160
"""Operations of one round: about 100 ms."""
KEPT = 2
"""How many earlier rounds' trees must stay as they were found."""
MOST_ACCESSES = 1200
"""A mount and a whole round take hold of media bytes about so often."""

pytestmark = [pytest.mark.mount, pytest.mark.timeout(60 + 2 * ROUNDS)]


class Loop:
    """One mount that is crashed again and again. ``earlier``: what the last rounds left, by directory."""

    def __init__(self, mount: QuickMount, counters: Path) -> None:
        self.mount = mount
        self.counters = counters
        self.earlier: dict[Path, Tree] = {}
        self.begun = self.crashes = 0

    def round(self, seed: int) -> str | None:
        """Crash in the midst of one workload; what is wrong then."""
        rng = random.Random(seed)
        how = rng.choice(["kill", "powerfail", "access"])
        sabotage = ("die_at_access", rng.randrange(1, MOST_ACCESSES)) if how == "access" else ()
        if not self._mount(*sabotage):
            return self._why_not_sound()
        assert self.mount.zygote is not None
        top = self.mount.path / f"round{seed}"
        self.counters.write_bytes(bytes(COUNTERS.size))
        worker = 0
        try:
            self._make_room(top)
            worker = self.mount.zygote.run(
                "tests.support.workload:execute", seed, LENGTH, str(top), str(self.counters)
            )
            if how != "access":
                time.sleep(rng.random() * 0.15)  # at any moment, that is what is tested
        except OSError:
            assert how == "access"
        if how == "access" and worker:
            wait_for_death(worker, self.mount.pid)
        {"powerfail": self.mount.powerfail}.get(how, self.mount.kill)()
        if worker:
            wait_for_end(worker)
        self.crashes += 1
        return self._why_not_sound() or self._why_not_promised(top, seed)

    def _mount(self, *sabotage: object) -> bool:
        """Whether it came to be mounted; it may die before."""
        try:
            self.mount.mount(*sabotage)
        except DaxemuError:
            assert sabotage
            self.mount.bury()
            self.crashes += 1
            return False
        return True

    def _make_room(self, top: Path) -> None:
        """An empty directory that is on the device; the oldest trees go, which nobody syncs."""
        top.mkdir()
        fd = os.open(self.mount.path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        for old in list(self.earlier)[:-KEPT]:
            del self.earlier[old]
            shutil.rmtree(old, ignore_errors=True)

    def _why_not_sound(self) -> str | None:
        wrong = self.mount.fsck().wrong
        return f"fsck: {wrong}" if wrong else None

    def _why_not_promised(self, top: Path, seed: int) -> str | None:
        begun, promised = COUNTERS.unpack(self.counters.read_bytes())
        self.begun += begun
        self.mount.mount()
        try:
            for directory, expected in self.earlier.items():
                if look(directory) != expected:
                    return f"{directory.name}, an earlier round's tree, is not what it was"
            if not top.exists():
                return "its directory is gone" if begun else None
            found = look(top)
            _, states = history(seed, LENGTH)
            self.earlier[top] = found
            wrong = why_not(found, states[promised : begun + 1])
            return f"{wrong} ({begun} operations begun, {promised} promised)" if wrong else None
        finally:
            self.mount.umount()


@pytest.mark.parametrize("quick_mount", [64 << 20], indirect=True)
def test_crashes_at_random_moments(quick_mount: QuickMount, tmp_path: Path) -> None:
    quick_mount.umount()
    loop = Loop(quick_mount, tmp_path / "counters")
    for number in range(ROUNDS):
        seed = SEED + number
        wrong = loop.round(seed)
        assert wrong is None, f"DAXEMU_CRASH_SEED={seed}, round {number + 1}: {wrong}"
    print(f"{loop.crashes} crashes, {loop.begun} operations")
    assert loop.crashes == ROUNDS
