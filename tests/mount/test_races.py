"""Memory failures against every change of a mapping at the same time: no process hangs, no process goes on
reading poison, and no signal reaches a process that it was not meant for.

DAXEMU_RACE_SECONDS is the duration of each test in seconds (``make soak``: ten minutes), DAXEMU_RACE_SEED the
seed. A race with the same seed still takes another course each time.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from daxemu.client import Client
from daxemu.errors import Busy, DaxemuError, NotMounted
from daxemu.host.proc.mountinfo import mount_of
from daxemu.uapi import BUS_ADRERR, BUS_MCEERR_AR, PAGE_SHIFT
from tests.support.actor import ActorTimeout
from tests.support.holders import Holders
from tests.support.quick import QuickMount
from tests.support.racer import KINDS, PATIENCE, Hang, Racer
from tests.support.races import (
    BAD,
    COMMON,
    VERBS,
    Injector,
    Races,
    fill,
    report_hang,
    why_not_last_signal,
    why_not_log,
)
from tests.support.scene import Scene, signals_of

SECONDS = float(os.environ.get("DAXEMU_RACE_SECONDS", "4"))
SEED = int(os.environ.get("DAXEMU_RACE_SEED", "1"))
BURST = min(5.0, SECONDS / 3)
ENOUGH = 1000 if SECONDS >= 600 else 1
"""Least number of races of each kind; a slow machine may take three times as long."""
LONGEST = 0.15
"""Seconds that a mount of the second test has before its end comes."""

GIVES_UP = (Hang, ActorTimeout, Busy, NotMounted)
"""Errors of a test whose supervisor hangs, or is dead."""
Signals = Callable[[], list[dict[str, Any]]]

pytestmark = [pytest.mark.mount, pytest.mark.timeout(120 + 4 * SECONDS)]


def test_everything_at_once(quick_mount: QuickMount, tmp_path: Path) -> None:
    quick_mount.umount()
    quick_mount.mount("tell_stacks")
    with Races(quick_mount, tmp_path, SEED) as races, Holders(quick_mount, SEED) as holders:
        begun, bursts = time.monotonic(), 0
        try:
            while True:
                races.burst(BURST, holders.round)
                bursts += 1
                wrong = races.why_not() + why_not_log(quick_mount)
                assert not wrong, f"DAXEMU_RACE_SEED={SEED}, burst {bursts}:\n" + "\n".join(wrong[:40])
                counts = {**races.counts, "held": holders.rounds}
                few = [what for what in (*KINDS, *VERBS, "held") if counts[what] < ENOUGH]
                elapsed = time.monotonic() - begun
                if elapsed > SECONDS and (not few or elapsed > 3 * SECONDS):
                    break
        except GIVES_UP as error:
            pytest.fail(report_hang(error, quick_mount, [racer.pid for racer in races.racers]))
        began, ended, recovered = races.failures()
    print(f"{counts}, {ended} failures")
    assert began == ended == recovered
    assert not few


@pytest.mark.parametrize("how", ["remove", "umount"])
def test_the_end_comes_meanwhile(quick_mount: QuickMount, tmp_path: Path, how: str) -> None:
    """The mount ends by surprise removal, or ``umount --force``, in the midst of failures; then a new mount
    begins.
    """
    rng = random.Random(SEED)
    deadline, ends = time.monotonic() + SECONDS, 0
    quick_mount.umount()
    while time.monotonic() < deadline or not ends:
        directory = tmp_path / str(ends)
        directory.mkdir()
        quick_mount.mount("tell_stacks")
        racers: list[Racer] = []
        try:
            wrong = _end(quick_mount, directory, rng, how, racers)
        except GIVES_UP as error:
            pytest.fail(report_hang(error, quick_mount, [racer.pid for racer in racers]))
        quick_mount.check()
        wrong += why_not_log(quick_mount)
        assert not wrong, f"DAXEMU_RACE_SEED={SEED}, end {ends + 1}:\n" + "\n".join(wrong[:40])
        ends += 1
    print(f"{how}: {ends}")


def _end(mount: QuickMount, directory: Path, rng: random.Random, how: str, racers: list[Racer]) -> list[str]:
    """End a mount in one of several ways; return the violations found."""
    with Client.at(mount.path) as client:
        client.request("clear", ranges=[[0, client.request("status")["size"]]])
    for left in mount.path.iterdir():
        left.unlink()
    fill(mount.path / "common", COMMON)
    stop = threading.Event()
    with ExitStack() as stack:
        for kind in rng.sample(KINDS, 3):
            signals = directory / f"{kind}.signals"
            racers.append(
                stack.enter_context(Racer(kind, rng.randrange(1 << 30), mount, signals, lenient=True))
            )
        holder = stack.enter_context(Scene(mount)).mapper(file="common", pages=COMMON)
        assert holder.cmd("tr 0 0").ok == "a"  # page 0 never fails
        with ThreadPoolExecutor(1) as pool:
            for racer in racers:
                racer.say("run")
            injecting = pool.submit(_inject, Injector(mount.path, rng.randrange(1 << 30)), stop)
            time.sleep(rng.random() * LONGEST)  # at any moment: the property under test
            try:
                wrong = {"remove": _remove, "umount": _umount}[how](mount, racers, lambda: signals_of(holder))
            finally:
                stop.set()
            injecting.result(PATIENCE)
        for racer in racers:
            if status := racer.end():
                wrong.append(f"{racer.kind} ended with {status}")
            wrong += [
                f"{racer.kind}: {text}: {seen}"
                for seen in racer.seen()
                if (text := why_not_last_signal(seen))
            ]
            wrong += racer.wrongs
    if how == "remove":
        mount.umount()
    return wrong


def _inject(injector: Injector, stop: threading.Event) -> None:
    with suppress(DaxemuError, OSError):  # whatever the end of the mount or of the device makes of a request
        injector.run(stop)


def _remove(mount: QuickMount, racers: list[Racer], signals: Signals) -> list[str]:
    with Client(mount_of(mount.path), patience=PATIENCE) as client:
        client.request("remove")
    got = signals()
    wrong = [] if [s["code"] for s in got][-1:] == ["BUS_MCEERR_AO"] else [f"the holder was told {got}"]
    for racer in racers:
        racer.say("park")
        racer.parked()
        for page in racer.verify():
            # Poison of the last second may have left an open arm: requested twice, cleared in between.
            was_armed = page.page in BAD and page.fault == (BUS_MCEERR_AR, PAGE_SHIFT, page.address)
            if page.fault != (BUS_ADRERR, 0, page.address) and not was_armed:
                wrong.append(f"{racer.kind}: the device is gone: {page}")
    return wrong


def _umount(mount: QuickMount, racers: list[Racer], signals: Signals) -> list[str]:
    mount.umount("--force")
    signals()
    return []
