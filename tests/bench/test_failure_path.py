"""What a failure costs: side by side in one run, medians and ratios, nothing asserted about time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.actor import Actor
from tests.support.mount import DaxMount, dax_mount_at

pytestmark = [pytest.mark.bench, pytest.mark.mount, pytest.mark.timeout(600)]

ROUNDS = 15


def timed(action: Callable[[], object]) -> float:
    """Seconds that ``action`` takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def mappers(stack: ExitStack, made: DaxMount, count: int) -> list[Actor]:
    """``count`` processes with early kill, each with page 1 of ``f`` present."""
    actors = [stack.enter_context(Actor.spawn(f"p{i}", cwd=made.path)) for i in range(count)]
    for actor in actors:
        for command in ("mcekill early", "open 0 f rw", "mmap 0 0 0 8 shared", "tr 0 1"):
            actor.cmd(command)
    return actors


def test_removal_6_gib_against_6_tib(tmp_path_factory: pytest.TempPathFactory) -> None:
    took: dict[str, list[float]] = {"6G": [], "6T": []}
    for _ in range(ROUNDS):
        for size, times in took.items():
            with dax_mount_at(tmp_path_factory.mktemp("bench"), size) as made, ExitStack() as stack:
                made.make_file("f", 8)
                mappers(stack, made, 2)
                with made.client() as client:
                    times.append(timed(lambda: client.request("remove")))
    small, large = (statistics.median(times) * 1e3 for times in took.values())
    print(f"\nremoval, 2 mappers: 6 GiB {small:.2f} ms, 6 TiB {large:.2f} ms, ratio {large / small:.2f}")


@pytest.mark.parametrize("victims", [0, 1, 10])
def test_inject_to_last_victim_signalled(tmp_path: Path, victims: int) -> None:
    took = []
    with dax_mount_at(tmp_path) as made, ExitStack() as stack:
        file = made.make_file("f", 8)
        ino = file.stat().st_ino
        actors = mappers(stack, made, victims)
        with made.client() as client:
            for _ in range(ROUNDS):
                took.append(timed(lambda: client.request("inject", ino=ino, ranges=[[4096, 4096]])))
                client.request("clear", ino=ino, ranges=[[4096, 4096]])
                for actor in actors:
                    actor.wait_signal()
                    actor.cmd("tr 0 1")
    print(f"\ninject to answer, {victims} victims: median {statistics.median(took) * 1e3:.2f} ms")
