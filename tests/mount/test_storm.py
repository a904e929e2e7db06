"""Many failures, many victims, all at once: no process hangs, no victim is missed."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from daxemu.cli.log import BURST
from daxemu.errors import InvalidArgument
from tests.support.actor import Actor
from tests.support.mount import PATIENCE, DaxMount
from tests.support.scene import PAGE, Scene, ao, ar, ask, letter, present, signals_of

pytestmark = pytest.mark.mount

VICTIMS = 20
RANGES = 100
ROUNDS = 100


class Background:
    """Jobs that run at the same time as the block; at its end all jobs must have finished without an
    error.
    """

    def __init__(self, *jobs: Callable[[], object]) -> None:
        self._pool = ThreadPoolExecutor(len(jobs))
        self._futures = [self._pool.submit(job) for job in jobs]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(wait=False)
        for future in self._futures:
            future.result(PATIENCE)


def poison(mount: DaxMount, file: str, *pages: int) -> None:
    """Inject through a connection of the caller's; a new process for each injection would take most of the
    time.
    """
    with mount.client() as client:
        ino = (mount.path / file).stat().st_ino
        client.request("inject", ino=ino, ranges=[[page * PAGE, PAGE] for page in pages])


def touch_all(actors: list[Actor], pages: int) -> None:
    for actor in actors:
        for page in range(pages):
            assert actor.cmd(f"tr 0 {page}").ok == letter(page)


def addresses(signals: list[dict[str, object]]) -> list[object]:
    return sorted((s["addr"] for s in signals), key=lambda addr: int(str(addr)[3:], 16))


def accounts_for_all(mount: DaxMount, func: str, text: str, count: int) -> None:
    """Check the kernel's log lines in a storm: lines and suppressed count add up, in no more than a screen or
    two.
    """
    lines = mount.run("log", mount.path, "--dmesg").splitlines()
    printed = sum(text in line for line in lines)
    suppressed = [int(line.split()[2]) for line in lines if f" {func}: " in line and "suppressed" in line]
    assert printed + sum(suppressed) == count
    assert bool(suppressed) == (count > BURST)
    assert printed <= BURST * (1 + len(suppressed))


# -- the storm


def test_a_hundred_ranges_and_twenty_processes(early: Scene) -> None:
    """Every other page of the file fails; each process is signalled once for each page, at the right
    address.
    """
    early.mount.make_file("big", 2 * RANGES)
    actors = early.mappers(VICTIMS, file="big", pages=2 * RANGES)
    touch_all(actors, 2 * RANGES)
    bad = list(range(0, 2 * RANGES, 2))
    outcomes = early.poison(*bad, file="big")
    assert [outcome["told"] for outcome in outcomes] == [VICTIMS] * RANGES
    for actor in actors:
        got = signals_of(actor)
        assert addresses(got) == [ao(page)["addr"] for page in bad]
        assert all(s == ao(int(str(s["addr"])[3:], 16) // PAGE) for s in got)
    events = early.mount.events("SignalSent")
    assert len(events) == VICTIMS * RANGES
    assert {e["result"] for e in events} == {"delivered"}
    accounts_for_all(early.mount, "kill_proc", "Sending SIGBUS", VICTIMS * RANGES)
    accounts_for_all(early.mount, "action_result", "recovery action", RANGES)
    for actor in actors:
        assert actor.cmd("tr 0 1").ok == letter(1)
        assert actor.cmd("tr 0 0").faulted
        assert signals_of(actor) == [ar(0)]


def test_a_hundred_ranges_one_after_the_other(early: Scene) -> None:
    early.mount.make_file("big", 2 * RANGES)
    actors = early.mappers(4, file="big", pages=2 * RANGES)
    touch_all(actors, 2 * RANGES)
    bad = list(range(1, 2 * RANGES, 2))
    for page in bad:
        poison(early.mount, "big", page)
    for actor in actors:
        assert addresses(signals_of(actor)) == [ao(page)["addr"] for page in bad]


def test_blocked_and_stormed(early: Scene) -> None:
    """Only one SIGBUS can be pending: further signals are queued, and none is lost."""
    p0 = early.mapper(touch=range(0, 128, 16), before=["sig block"])
    bad = list(range(0, 128, 16))
    early.poison(*bad)
    got: list[object] = []
    while len(got) < len(bad):
        if ask(p0, "sig pending"):
            assert ask(p0, "sig take") == signal.SIGBUS
            got += [s["addr"] for s in signals_of(p0)]
    assert sorted(got, key=str) == sorted((ao(page)["addr"] for page in bad), key=str)
    assert ask(p0, "sig pending") == 0


def test_many_processes_touch_pages_that_are_being_poisoned(scene: Scene) -> None:
    """All processes touch one page or another in a loop while all pages are poisoned."""
    actors = scene.mappers(8)
    pages = [16 * i for i in range(8)]
    for actor, page in zip(actors, pages, strict=True):
        actor.start_spin(0, page)
    scene.poison(*pages)
    for actor, page in zip(actors, pages, strict=True):
        assert actor.reply().faulted
        assert signals_of(actor) == [ar(page)]


# -- at the same time


def test_two_clients_inject_at_once(early: Scene) -> None:
    """Each client injects into its own pages, and both into the same pages."""
    actors = early.mappers(4)
    touch_all(actors, 128)
    halves = list(range(60)), list(range(64, 124))
    with Background(*(partial(poison, early.mount, "f", *pages, 126) for pages in halves)):
        pass
    expected = {ao(page)["addr"] for pages in halves for page in (*pages, 126)}
    for actor in actors:
        got = [s["addr"] for s in signals_of(actor)]
        assert set(got) == expected
        assert len(got) == len(expected), "told twice of what was present once"
    assert sum(count for _, count in early.badblocks()) == 121 * 8


def test_victims_that_die_meanwhile(early: Scene) -> None:
    """Half of the victims are killed during delivery; the other half gets every signal."""
    early.mount.make_file("big", RANGES)
    actors = early.mappers(VICTIMS, file="big", pages=RANGES)
    touch_all(actors, RANGES)
    bad = list(range(0, RANGES, 2))
    with Background(partial(poison, early.mount, "big", *bad)):
        for actor in actors[::2]:
            actor.kill()
    for actor in actors[1::2]:
        assert addresses(signals_of(actor)) == [ao(page)["addr"] for page in bad]
    poison(early.mount, "big", 1)
    for actor in actors[1::2]:
        assert signals_of(actor) == [ao(1)]


def test_victims_that_die_of_it(early: Scene) -> None:
    early.mount.make_file("big", RANGES)
    actors = early.mappers(VICTIMS, file="big", pages=RANGES, before=["sig default"])
    touch_all(actors, RANGES)
    poison(early.mount, "big", *range(0, RANGES, 2))
    for actor in actors:
        assert actor.wait_death().signal is signal.SIGBUS


# -- files that change under the injection


def still_learns(actor: Actor, page: int) -> None:
    """Check that the process was signalled for the page, or is at the next touch of the page."""
    if ao(page) in signals_of(actor):
        return
    result = actor.cmd(f"tr 0 {page}")
    assert result.faulted, f"{actor.name} read {result} and was told nothing"
    assert signals_of(actor) == [ar(page)]


def test_files_that_are_unlinked_meanwhile(early: Scene) -> None:
    path = early.mount.path
    p0 = early.actor()
    for round_ in range(ROUNDS):
        file = early.mount.make_file("doomed", 16)
        ask(p0, "open 0 doomed rw")
        ask(p0, "mmap 0 0 0 16 shared")
        assert p0.cmd("tr 0 5").ok == letter(5)
        ino = file.stat().st_ino
        with Background(partial(poison_inode, early.mount, ino, 5)):
            file.unlink()
        still_learns(p0, 5)
        assert p0.cmd("tr 0 6").ok == letter(6), round_
        ask(p0, "munmap 0")
        ask(p0, "close 0")
    assert list(path.iterdir()) == [path / "f"]
    assert early.damaged() == []


def poison_inode(mount: DaxMount, ino: int, page: int) -> None:
    with mount.client() as client:
        client.request("inject", ino=ino, ranges=[[page * PAGE, PAGE]])


def test_files_that_are_truncated_meanwhile(early: Scene) -> None:
    """The poisoned page is cut off, or still present: then a touch is AR; a touch of a page cut off is a
    fault of its own.
    """
    p0 = early.actor()
    for round_ in range(ROUNDS):
        file = early.mount.make_file("cut", 16)
        ask(p0, "open 0 cut rw")
        ask(p0, "mmap 0 0 0 16 shared")
        assert p0.cmd("tr 0 5").ok == letter(5)
        ino = file.stat().st_ino
        with Background(partial(try_poison, early.mount, ino, 5, 12)):
            assert ask(p0, f"trunc 0 {8 * PAGE}") == 0
        assert p0.cmd("tr 0 12").faulted
        codes = {s["code"] for s in signals_of(p0) if s["addr"] == ao(12)["addr"]}
        assert codes <= {"BUS_ADRERR", "BUS_MCEERR_AO"}
        assert "BUS_ADRERR" in codes
        if early.damaged():
            assert refuses_to_be_read(p0, 5)
        else:
            assert p0.cmd("tr 0 5").ok == letter(5), round_
        ask(p0, "munmap 0")
        ask(p0, "close 0")
        file.unlink()


def refuses_to_be_read(actor: Actor, page: int) -> bool:
    faulted = actor.cmd(f"tr 0 {page}").faulted
    return faulted and signals_of(actor) == [ar(page)]


def try_poison(mount: DaxMount, ino: int, *pages: int) -> None:
    """Inject into all of the pages or, once the file has become too short, into none."""
    with mount.client() as client:
        try:
            client.request("inject", ino=ino, ranges=[[page * PAGE, PAGE] for page in pages])
        except InvalidArgument:
            return


def test_files_that_are_cloned_meanwhile(early: Scene) -> None:
    """Every process that maps the clone learns of shared poison, whether the clone was made before or after
    the failure.
    """
    p0, p1 = early.actor("p0"), early.actor("p1")
    path = early.mount.path
    for round_ in range(ROUNDS // 2):
        file = early.mount.make_file("source", 16)
        clone = path / "clone"
        ask(p0, "open 0 source rw")
        ask(p0, "mmap 0 0 0 16 shared")
        assert p0.cmd("tr 0 5").ok == letter(5)
        ino = file.stat().st_ino
        with Background(partial(poison_inode, early.mount, ino, 5)):
            reflink(early.mount, file, clone)
            ask(p1, "open 0 clone rw")
            ask(p1, "mmap 0 0 0 16 shared")
            p1.cmd("tr 0 5")
        still_learns(p0, 5)
        if not signals_of(p1):
            still_learns(p1, 5)
        for actor in (p0, p1):
            assert actor.cmd("tr 0 6").ok == letter(6), round_
            assert not present(actor, 0, 5)
            ask(actor, "munmap 0")
            ask(actor, "close 0")
        file.unlink()
        clone.unlink()


def reflink(mount: DaxMount, source: Path, clone: Path) -> None:
    clone.touch()
    with mount.client() as client:
        client.request("reflink", src=source.stat().st_ino, dst=clone.stat().st_ino)
