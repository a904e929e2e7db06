"""AO: poison is mapped, not consumed. Which processes and threads are signalled, and with which siginfo."""

from __future__ import annotations

import os
import signal

import pytest

from tests.support.actor import Actor
from tests.support.scene import (
    FAR,
    PAGE,
    PAGES,
    Scene,
    ao,
    ar,
    ask,
    consumes,
    is_plain_sigbus,
    letter,
    present,
    second_tracer,
    signals_of,
)

pytestmark = pytest.mark.mount

BAD = 1
"""Page to poison."""


# -- policy


def test_late_is_the_default_and_nothing_happens_then(scene: Scene) -> None:
    p0 = scene.mapper(touch=[BAD])
    (outcome,) = scene.poison(BAD)
    assert (outcome["outcome"], outcome["told"]) == ("Recovered", 0)
    assert signals_of(p0) == []
    assert scene.mount.events("SignalSent") == []
    assert p0.cmd("tr 0 0").ok == letter(0)


def test_early_by_the_sysctl(early: Scene) -> None:
    p0 = early.mapper(touch=[BAD])
    (outcome,) = early.poison(BAD)
    assert (outcome["outcome"], outcome["told"]) == ("Recovered", 1)
    assert signals_of(p0) == [ao(BAD)]
    assert not present(p0, 0, BAD)
    assert p0.cmd("tr 0 0").ok == letter(0)
    assert p0.cmd("tr 0 2").ok == letter(2)


def test_early_by_prctl(scene: Scene) -> None:
    p0 = scene.mapper(touch=[BAD], before=["mcekill early"])
    p1 = scene.mapper("p1", touch=[BAD])
    (outcome,) = scene.poison(BAD)
    assert outcome["told"] == 1
    assert signals_of(p0) == [ao(BAD)]
    assert signals_of(p1) == []


def test_late_by_prctl_outweighs_the_sysctl(early: Scene) -> None:
    p0 = early.mapper(touch=[BAD], before=["mcekill late"])
    (outcome,) = early.poison(BAD)
    assert (outcome["outcome"], outcome["told"]) == ("Recovered", 0)
    assert signals_of(p0) == []


def test_policy_default_by_prctl_is_the_sysctl(early: Scene) -> None:
    p0 = early.mapper(touch=[BAD], before=["mcekill late", "mcekill default"])
    early.poison(BAD)
    assert signals_of(p0) == [ao(BAD)]


@pytest.mark.parametrize(
    ("sysctl", "main", "policies", "chosen"),
    [
        pytest.param(1, "default", "n n n", 0, id="f0"),
        pytest.param(0, "default", "n e n", 2, id="f1"),
        pytest.param(0, "default", "l n e", 3, id="f3"),
        pytest.param(1, "late", "l n e", 2, id="late-threads-are-passed-over"),
        pytest.param(0, "early", "e n n", 0, id="the-first-early-one"),
        pytest.param(1, "late", "l l l", None, id="all-late"),
        pytest.param(0, "default", "n l n", None, id="nobody-early"),
    ],
)
def test_the_signalled_thread_follows_the_kill_policies(
    scene: Scene, sysctl: int, main: str, policies: str, chosen: int | None
) -> None:
    scene.set(early_kill=sysctl)
    p0 = scene.mapper(touch=[BAD], before=[f"threads {policies}", f"mcekill {main}"])
    scene.poison(BAD)
    assert signals_of(p0) == ([] if chosen is None else [ao(BAD, thread=chosen)])
    if chosen is not None:
        (event,) = scene.signal_events(p0)
        assert (event["tid"], event["comm"], event["result"]) == (p0.tid(chosen), "p0", "delivered")
        assert (event["address"], event["lsb"], event["code"]) == (p0.addr(0, BAD), 12, 5)


# -- presence


def test_only_processes_with_the_page_present_are_signalled(early: Scene) -> None:
    p0 = early.mapper("p0", touch=[BAD])
    elsewhere = early.mapper("p1", first=BAD + FAR, pages=FAR, touch=[0])
    untouched = early.mapper("p2", touch=[BAD + FAR])
    opener = early.actor("p3")
    ask(opener, "open 0 f rw")
    unmapped = early.mapper("p4", touch=[BAD])
    ask(unmapped, "munmap 0")
    assert not present(untouched, 0, BAD)
    (outcome,) = early.poison(BAD)
    assert outcome["told"] == 1
    assert signals_of(p0) == [ao(BAD)]
    for other in (elsewhere, untouched, opener, unmapped):
        assert signals_of(other) == []
    assert elsewhere.cmd("tr 0 0").ok == letter(BAD + FAR)
    assert untouched.cmd(f"tr 0 {BAD + FAR}").ok == letter(BAD + FAR)
    consumes(untouched, f"tr 0 {BAD}", ar(BAD))


def test_address_is_that_of_the_page_in_ones_own_mapping(early: Scene) -> None:
    p0 = early.mapper("p0", touch=[40])
    p1 = early.mapper("p1", first=32, pages=16, touch=[8])
    p2 = early.actor("p2")
    for command in ("open 0 f rw", "mmap 0 0 0 2 shared", "mmap 1 0 40 1 ro", "tr 1 0"):
        p2.cmd(command)
    early.poison(40)
    assert signals_of(p0) == [ao(40)]
    assert signals_of(p1) == [ao(8)]
    assert signals_of(p2) == [ao(0, mapping=1)]


def sending_lines(scene: Scene, actor: Actor) -> int:
    log = scene.mount.run("log", scene.mount.path, "--dmesg")
    return log.count(f"Sending SIGBUS to {actor.name}:{actor.pid} due to hardware memory corruption")


def test_two_mappings_of_the_page_in_one_process_get_one_signal(early: Scene) -> None:
    """Standard signals do not queue: the second mapping's SIGBUS merges with the first's."""
    p0 = early.mapper(touch=[BAD])
    ask(p0, "mmap 1 0 0 8 shared")
    assert p0.cmd(f"tr 1 {BAD}").ok == letter(BAD)
    first, second = sorted((0, 1), key=lambda mapping: -p0.addr(mapping, BAD))
    (outcome,) = early.poison(BAD)
    assert outcome["told"] == 2
    assert signals_of(p0) == [ao(BAD, mapping=first)]
    assert [(e["result"], e["address"]) for e in early.signal_events(p0)] == [
        ("delivered", p0.addr(first, BAD)),
        ("merged", p0.addr(second, BAD)),
    ]
    assert sending_lines(early, p0) == 2
    assert not present(p0, 0, BAD)
    assert not present(p0, 1, BAD)


def test_the_mapping_from_the_lowest_page_of_the_file_is_signalled(early: Scene) -> None:
    """The kernel's i_mmap is ordered by the first page of a mapping, whichever was made first."""
    p0 = early.mapper(first=1, touch=[BAD - 1])
    ask(p0, "mmap 1 0 0 8 shared")
    assert p0.cmd(f"tr 1 {BAD}").ok == letter(BAD)
    early.poison(BAD)
    assert signals_of(p0) == [ao(BAD, mapping=1)]
    assert sending_lines(early, p0) == 2


def test_several_ranges_in_one_call(early: Scene) -> None:
    bad = [BAD, BAD + FAR, BAD + 2 * FAR]
    p0, p1 = early.mapper("p0", touch=bad), early.mapper("p1", touch=bad[:2])
    assert [outcome["told"] for outcome in early.poison(*bad)] == [2, 2, 1]
    assert sorted(signals_of(p0), key=lambda s: int(str(s["addr"])[3:], 16)) == [ao(page) for page in bad]
    assert sorted(signals_of(p1), key=lambda s: int(str(s["addr"])[3:], 16)) == [ao(page) for page in bad[:2]]


def test_a_stat_takes_no_page_away(early: Scene) -> None:
    """The new times after write(2), or after a store was written back, make the kernel drop nothing."""
    p0 = early.mapper(touch=[BAD, BAD + FAR])
    path = early.mount.path / "f"
    path.stat()
    assert present(p0, 0, BAD)
    assert p0.cmd(f"tw 0 {BAD + FAR} x").ok == "x"
    ask(p0, f"pwrite 0 {2 * FAR * PAGE} {PAGE} y")
    ask(p0, "fsync 0")
    assert path.stat().st_size == PAGES * PAGE
    assert present(p0, 0, BAD)
    early.poison(BAD)
    assert signals_of(p0) == [ao(BAD)]


def test_a_file_that_does_not_share_the_page(early: Scene) -> None:
    early.mount.make_file("g", PAGES)
    p0 = early.mapper("p0", "g", touch=[BAD])
    p1 = early.mapper("p1", touch=[BAD])
    early.poison(BAD)
    assert signals_of(p1) == [ao(BAD)]
    assert signals_of(p0) == []
    assert present(p0, 0, BAD)
    assert p0.cmd(f"tr 0 {BAD}").ok == letter(BAD)
    assert p0.cmd(f"tw 0 {BAD} x").ok == "x"


# -- fork, private mappings


def test_a_fork_without_the_page(early: Scene) -> None:
    """The child of fork(2) gets no page tables of a shared mapping: it has the page present only after a
    touch (`j0-fork-late`, `j0-fork-early`).
    """
    p0 = early.mapper(touch=[BAD])
    p1 = p0.fork("p1")
    early.poison(BAD)
    assert signals_of(p0) == [ao(BAD)]
    assert signals_of(p1) == []
    consumes(p1, f"tr 0 {BAD}", ar(BAD))


def test_a_fork_that_touched(early: Scene) -> None:
    """A child that touched the page after fork(2) is a victim, too (`j3-fork-child-touched`)."""
    p0 = early.mapper(touch=[BAD])
    p1 = p0.fork("p1")
    assert p1.cmd(f"tr 0 {BAD}").ok == letter(BAD)
    early.poison(BAD)
    assert signals_of(p0) == [ao(BAD)]
    assert signals_of(p1) == [ao(BAD)]


def test_private_mappings(early: Scene) -> None:
    """A private mapping that was only read has the file's page present; after a store it has a copy
    (`i0-private-late`).
    """
    reader = early.mapper("p0", touch=[BAD], kind="private")
    copier = early.mapper("p1", touch=[BAD], kind="private")
    sharer = early.mapper("p2", touch=[BAD])
    assert copier.cmd(f"tw 0 {BAD} c").ok == "c"
    (outcome,) = early.poison(BAD)
    assert outcome["told"] == 2
    assert signals_of(reader) == [ao(BAD)]
    assert signals_of(sharer) == [ao(BAD)]
    assert signals_of(copier) == []
    assert copier.cmd(f"tr 0 {BAD}").ok == "c"
    consumes(reader, f"tr 0 {BAD}", ar(BAD))


# -- the victim's disposition of SIGBUS


def test_a_blocked_sigbus_is_pending_with_its_siginfo(early: Scene) -> None:
    """A blocked SIGBUS stays pending with its exact siginfo (`e0-block-early`)."""
    p0 = early.mapper(touch=[BAD], before=["sig block"])
    early.poison(BAD)
    assert ask(p0, "sig pending") == 1
    assert ask(p0, "sig take") == signal.SIGBUS
    assert signals_of(p0) == [ao(BAD, how="pending, taken with sigtimedwait")]
    assert ask(p0, "sig pending") == 0
    assert [event["result"] for event in early.signal_events(p0)] == ["delivered"]


def test_blocked_and_late(scene: Scene) -> None:
    p0 = scene.mapper(touch=[BAD], before=["sig block"])
    scene.poison(BAD)
    assert ask(p0, "sig pending") == 0


def test_a_process_that_ignores_sigbus_gets_no_signal(early: Scene) -> None:
    """A process that ignores SIGBUS gets no AO (`e1-ignore-early`)."""
    p0 = early.mapper(touch=[BAD], before=["sig ignore"])
    early.poison(BAD)
    assert signals_of(p0) == []
    assert p0.alive
    assert [event["result"] for event in early.signal_events(p0)] == ["ignored"]


def test_the_default_action_kills_the_process(early: Scene) -> None:
    """A process with the default action dies of the AO; a late killer lives on (`e2-default-early`)."""
    p0 = early.mapper("p0", touch=[BAD], before=["sig default"])
    p1 = early.mapper("p1", touch=[BAD], before=["sig default", "mcekill late"])
    early.poison(BAD)
    assert p0.wait_death().signal is signal.SIGBUS
    assert signals_of(p1) == []
    assert [event["result"] for event in early.signal_events(p0)] == ["delivered"]


# -- obstacles to delivery


def test_a_victim_traced_by_another_process_gets_a_plain_sigbus(early: Scene) -> None:
    """PTRACE_SEIZE is refused: the victim gets a plain SIGBUS, and the event says so with the reason."""
    p0, p1 = early.mapper("p0", touch=[BAD]), early.mapper("p1", touch=[BAD])
    with second_tracer(p0.pid):
        (outcome,) = early.poison(BAD)
        got = p0.wait_signal()
        assert is_plain_sigbus(got), got
        assert outcome["told"] == 2
        assert signals_of(p0) == []
        (event,) = early.signal_events(p0)
        assert event["result"] == "inexact"
        assert "trace" in event["reason"]
    assert signals_of(p1) == [ao(BAD)]


def stop(actor: Actor) -> None:
    os.kill(actor.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, actor.pid, os.WSTOPPED | os.WNOWAIT)


def test_a_stopped_process_does_not_hold_up_anybody(early: Scene) -> None:
    p0, p1 = early.mapper("p0", touch=[BAD]), early.mapper("p1", touch=[BAD])
    stop(p0)
    (outcome,) = early.poison(BAD)
    assert outcome["told"] == 2
    assert signals_of(p1) == [ao(BAD)]
    assert [event["result"] for event in early.signal_events(p0)] == ["pending"]
    early.poison(BAD + FAR)
    os.kill(p0.pid, signal.SIGCONT)
    assert p0.wait_signal().recorded() == ao(BAD)
    with early.mount.client() as client:
        results = (e["result"] for e in client.follow() if e["event"] == "SignalSent" and e["pid"] == p0.pid)
        assert [next(results), next(results)] == ["pending", "delivered"]
