"""A thread that exits at the moment of its signal: the signal reaches the right thread or none, and no verb
waits.
"""

from __future__ import annotations

import random
import subprocess
import threading
from collections import Counter

import pytest

from daxemu.uapi import BUS_MCEERR_AO, BUS_MCEERR_AR
from tests.mount.test_held_up import started
from tests.support.mount import PATIENCE, DaxMount
from tests.support.scene import Scene, ao, signals_of

pytestmark = pytest.mark.mount

PAGES = 24
ROUNDS = 8


def counted(process: subprocess.Popen[str]) -> dict[str, int]:
    """Return the numbers that the program prints at its end."""
    said, _ = process.communicate(timeout=PATIENCE)
    words = said.split()
    assert process.returncode == 0, said
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))


def delivered(mount: DaxMount, pid: int) -> dict[str, int]:
    """Return the numbers of the signals to a process that were delivered, by the events."""
    with mount.client() as client:
        client.settle()
    sent = [event for event in mount.events("SignalSent") if event["pid"] == pid]
    assert {event["result"] for event in sent} <= {"delivered", "gone"}
    codes = Counter(event["code"] for event in sent if event["result"] == "delivered")
    return {"AO": codes[BUS_MCEERR_AO], "AR": codes[BUS_MCEERR_AR], "wrong": 0}


def test_threads_that_come_and_go(scene: Scene) -> None:
    other = scene.mapper("p1", touch=range(PAGES), before=["mcekill early"])
    with started("exiter", scene.mount.path / "f", "0", str(PAGES), "threads") as process:
        for page in range(PAGES):
            scene.poison(page)
            assert signals_of(other) == [ao(page)]
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
        found = counted(process)
    assert found == delivered(scene.mount, process.pid)
    assert found["AR"] >= PAGES


def test_a_leader_that_exits(early: Scene) -> None:
    """The leader is the victim of the AO. Another thread loads all the time, and takes the AR."""
    rng = random.Random(1)
    for page in range(ROUNDS):
        with started("exiter", early.mount.path / "f", str(page), "1", "leader") as process:
            assert process.stdin is not None
            exit_ = threading.Timer(rng.random() * 0.03, process.stdin.close)
            exit_.start()
            early.poison(page)
            exit_.join()
            process.stdin = None
            found = counted(process)
            assert found["AR"] == 1
            assert found == delivered(early.mount, process.pid)
