"""Crashes at random moments of a random workload: the device is always sound, and all data promised by fsync
is present.

DAXEMU_CRASH_ROUNDS is the number of rounds (60 take 25 s; ``make soak``: 5,000), DAXEMU_CRASH_SEED the seed.
A failure prints the seed of the round: with this seed and DAXEMU_CRASH_ROUNDS=1 the round runs again, but
crashes at another moment.
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

ROUNDS = int(os.environ.get("DAXEMU_CRASH_ROUNDS", "60"))
SEED = int(os.environ.get("DAXEMU_CRASH_SEED", "1"))
LENGTH = 160
"""Operations of one round: about 100 ms."""
KEPT = 2
"""Number of earlier rounds whose trees must not change."""
MOST_ACCESSES = 1200
"""Approximate number of media accesses of a mount and a whole round."""

pytestmark = [pytest.mark.mount, pytest.mark.timeout(60 + 2 * ROUNDS)]


class Loop:
    """Mount, crashed again and again. ``earlier``: the trees of the last rounds, by directory."""

    def __init__(self, mount: QuickMount, counters: Path) -> None:
        self.mount = mount
        self.counters = counters
        self.earlier: dict[Path, Tree] = {}
        self.begun = self.crashes = 0

    def round(self, seed: int) -> str | None:
        """Crash in the midst of one workload; return the violations found afterwards."""
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
        """Mount; return False if the supervisor died first."""
        try:
            self.mount.mount(*sabotage)
        except DaxemuError:
            assert sabotage
            self.mount.bury()
            self.crashes += 1
            return False
        return True

    def _make_room(self, top: Path) -> None:
        """Return an empty directory whose creation is durable. The oldest trees are deleted, without
        a sync.
        """
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
