"""daxemu run: an unmodified program's madvise(MADV_HWPOISON) and madvise(MADV_SOFT_OFFLINE)."""

from __future__ import annotations

import re
import signal

import pytest

from tests.support.actor import Death, compile_victim
from tests.support.scene import FAR, PAGE, Scene, ao, ar, ask, consumes, refused, signals_of
from tests.support.syscalls import clone_range
from tests.support.under_run import at_return, run, under_run

pytestmark = pytest.mark.mount

BAD = 1
SIGBUS_DEATH = Death(signal=signal.SIGBUS)


def poisoner(scene: Scene, *arguments: str | int) -> list[str]:
    """Run the C program; return the output."""
    return run(scene, compile_victim("poisoner"), *map(str, arguments)).splitlines()


def dmesg(scene: Scene) -> list[str]:
    """The log, in the recordings' form."""
    lines = scene.mount.run("log", scene.mount.path, "--dmesg").splitlines()
    lines = [re.sub(r"0x1[0-9a-f]{5}\b", "PFN", line.partition("] ")[2]) for line in lines]
    return [re.sub(r"(p\d):\d+", r"\1", re.sub(r"0x7[0-9a-f]{11}\b", "VA", line)) for line in lines]


INJECTING = "Injecting memory failure for pfn PFN at process virtual address VA"
SENDING = "Memory failure: PFN: Sending SIGBUS to p0 due to hardware memory corruption"
RECOVERED = "Memory failure: PFN: recovery action for dax page: Recovered"


# -- the recordings


@pytest.mark.parametrize("policy", ["late", "early", "default"])
def test_whatever_its_policy(scene: Scene, policy: str) -> None:
    """The caller gets AR with every kill policy (`k0-madvise-self-late`, `k0-madvise-self-early`)."""
    p0 = under_run(scene)
    ask(p0, f"mcekill {policy}")
    assert ask(p0, f"madvise 0 {BAD} 1 hwpoison") == 0
    assert signals_of(p0) == [at_return(BAD)]
    assert dmesg(scene) == [INJECTING, SENDING, RECOVERED]
    consumes(p0, f"tr 0 {BAD}", ar(BAD))
    assert scene.damaged() == [("/f", BAD * PAGE, PAGE)]


def test_two_pages_one_signal(scene: Scene) -> None:
    """An madvise(2) over two pages fails both pages; the caller sees one signal (`k2-madvise-2pages`)."""
    p0 = under_run(scene)
    assert ask(p0, f"madvise 0 {BAD} 2 hwpoison") == 0
    assert signals_of(p0) == [at_return(BAD)]
    assert dmesg(scene) == [INJECTING, SENDING, RECOVERED] * 2
    assert scene.mount.json("status", scene.mount.path)["counters"]["recovered"] == 2
    assert [e["result"] for e in scene.signal_events(p0)] == ["delivered", "pending"]


def test_soft_offline_is_refused(scene: Scene) -> None:
    """MADV_SOFT_OFFLINE fails with EIO, without a signal or a bad block (`l0-soft-offline`)."""
    p0 = under_run(scene)
    assert refused(p0, f"madvise 0 {BAD} 1 soft") == "EIO"
    assert p0.cmd(f"tr 0 {BAD}").ok == "B"
    assert signals_of(p0) == []
    assert dmesg(scene) == ["Soft offlining pfn PFN at process virtual address VA"]
    assert scene.badblocks() == []


def test_simulated_the_media_stays_good(scene: Scene) -> None:
    """Simulated poison leaves the media readable afterwards, as the program of fstests expects
    (`k0-madvise-self-late`).
    """
    p0 = under_run(scene, "--simulated")
    assert p0.cmd(f"tw 0 {BAD} x").ok == "x"
    for _ in range(2):
        ask(p0, f"madvise 0 {BAD} 1 hwpoison")
        assert signals_of(p0) == [at_return(BAD)]
        assert p0.cmd(f"tr 0 {BAD}").ok == "x"
    assert p0.cmd(f"pread 0 {BAD * PAGE} {PAGE}").ret == PAGE
    assert ask(p0, "fsync 0") == 0
    assert dmesg(scene) == [INJECTING, SENDING, RECOVERED] * 2
    assert scene.badblocks() == []


# -- other processes that are signalled


def test_others_by_their_policy(scene: Scene) -> None:
    early, late = (
        scene.mapper(policy, touch=[BAD], before=[f"mcekill {policy}"]) for policy in ("early", "late")
    )
    also = under_run(scene, name="p1")
    ask(also, "mcekill early")
    assert also.cmd(f"tr 0 {BAD}").ok == "B"
    p0 = under_run(scene)
    ask(p0, f"madvise 0 {BAD} 1 hwpoison")
    assert signals_of(p0) == [at_return(BAD)]
    assert signals_of(early) == signals_of(also) == [ao(BAD)]
    assert signals_of(late) == []
    consumes(late, f"tr 0 {BAD}", ar(BAD))
    consumes(also, f"tr 0 {BAD}", ar(BAD))


def test_other_injections_reach_it_as_anybody(early: Scene) -> None:
    p0 = under_run(early)
    assert p0.cmd(f"tr 0 {BAD + FAR}").ok is not None
    early.poison(BAD + FAR)
    assert signals_of(p0) == [ao(BAD + FAR)]


@pytest.mark.parametrize("how", ["block", "ignore", "default"])
def test_action_optional_when_it_is_not_handled(early: Scene, how: str) -> None:
    p0 = under_run(early)
    assert p0.cmd(f"tr 0 {BAD + FAR}").ok is not None
    p0.cmd(f"sig {how}")
    early.poison(BAD + FAR)
    if how == "default":
        assert p0.wait_death() == SIGBUS_DEATH
    elif how == "ignore":
        assert signals_of(p0) == []
    else:
        assert ask(p0, "sig take") == signal.SIGBUS
        assert signals_of(p0) == [ao(BAD + FAR, how="pending, taken with sigtimedwait")]


# -- forced


@pytest.mark.parametrize("how", ["block", "ignore", "default"])
def test_blocked_or_ignored_it_dies(scene: Scene, how: str) -> None:
    p0 = under_run(scene)
    p0.cmd(f"sig {how}")
    p0.send(f"madvise 0 {BAD} 1 hwpoison")
    assert p0.wait_death() == SIGBUS_DEATH
    assert [e["result"] for e in scene.signal_events(p0)] == ["delivered"]


def test_blocked_in_a_thread_all_die(scene: Scene) -> None:
    said = run(scene, compile_victim("poisoner"), "blocked-thread", "f", "1", status=-signal.SIGBUS)
    assert said == ""


# -- programs


@pytest.mark.parametrize(
    ("how", "name"),
    [("load", "main"), ("store", "main"), ("thread", "main"), ("fork", "child"), ("vfork", "main")],
)
def test_programs(scene: Scene, how: str, name: str) -> None:
    assert poisoner(scene, how, "f", BAD, 3) == [
        f"{name}: code 4 page {BAD} lsb 12 caller",
        f"{name}: madvise 0",
    ]
    assert scene.damaged() == [("/f", BAD * PAGE, 3 * PAGE)]


def test_plain_file_two_processes(scene: Scene) -> None:
    """xfs/550: the failure of an unshared file reaches both processes."""
    assert sorted(poisoner(scene, "sharers", "f", 3, "f", 3)) == [
        "child: code 4 page 3 lsb 12 caller",
        "child: madvise 0",
        "main: code 5 page 3 lsb 12",
    ]


@pytest.mark.parametrize(("read", "poison"), [("f", "g"), ("g", "f")])
def test_reflinked_file(scene: Scene, read: str, poison: str) -> None:
    """xfs/551: the failure reaches every owner of the block."""
    scene.mount.run("reflink", scene.mount.path / "f", scene.mount.path / "g")
    assert sorted(poisoner(scene, "sharers", read, 2, poison, 2)) == [
        "child: code 4 page 2 lsb 12 caller",
        "child: madvise 0",
        "main: code 5 page 2 lsb 12",
    ]
    assert scene.damaged() == [("/f", 2 * PAGE, PAGE), ("/g", 2 * PAGE, PAGE)]


def test_partly_reflinked_file(scene: Scene) -> None:
    """xfs/552: each owner is signalled at its own offset; an unshared page has one owner."""
    g = scene.mount.make_file("g", 64, "a")
    with g.open("r+b") as target, (scene.mount.path / "f").open("rb") as source:
        clone_range(target.fileno(), source.fileno(), 3 * PAGE, PAGE, 5 * PAGE)
    assert sorted(poisoner(scene, "sharers", "g", 5, "f", 3)) == [
        "child: code 4 page 3 lsb 12 caller",
        "child: madvise 0",
        "main: code 5 page 5 lsb 12",
    ]
    assert poisoner(scene, "sharers", "g", 40, "f", 40) == [
        "child: code 4 page 40 lsb 12 caller",
        "child: madvise 0",
    ]


def test_forked_and_executed_actors(scene: Scene) -> None:
    p0 = under_run(scene)
    p1 = p0.fork("p1")
    ask(p1, "madvise 0 1 1 hwpoison")
    assert signals_of(p1) == [at_return(1)]
    assert signals_of(p0) == []
    p0.exec()
    ask(p0, "open 0 f rw")
    ask(p0, "mmap 0 0 0 128 shared")
    ask(p0, "madvise 0 2 1 hwpoison")
    assert signals_of(p0) == [at_return(2)]


def test_one_after_another(scene: Scene) -> None:
    p0 = under_run(scene)
    for page in range(64):
        ask(p0, f"madvise 0 {page} 1 hwpoison")
        assert signals_of(p0) == [at_return(page)]
    assert len(scene.mount.events("MadviseInjected")) == 64


def test_many_at_once(early: Scene) -> None:
    """The processes map each other's pages: each gets AR for its own page, and AO for the others by kill
    policy.
    """
    actors = [under_run(early, name=f"p{i}") for i in range(6)]
    for actor in actors:
        for page in range(6):
            assert actor.cmd(f"tr 0 {page}").ok is not None
    for index, actor in enumerate(actors):
        actor.send(f"madvise 0 {index} 1 hwpoison")
    for actor in actors:
        assert actor.reply().ret == 0
    for index, actor in enumerate(actors):
        signals = signals_of(actor)
        assert [s["addr"] for s in signals if s["code"] == "BUS_MCEERR_AR"] == [f"m0+{index * PAGE:#x}"]
    assert len(early.damaged()) == 1
