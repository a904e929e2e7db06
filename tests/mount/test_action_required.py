"""AR: poison is consumed. Every touch kills the process or is handled, whatever the kill policy."""

from __future__ import annotations

import signal

import pytest

from tests.support.scene import (
    FAR,
    PAGE,
    PAGES,
    Scene,
    ao,
    ar,
    ask,
    consumes,
    letter,
    present,
    refused,
    second_tracer,
    signals_of,
)

pytestmark = pytest.mark.mount

BAD = 1
"""Page to poison."""


# -- the access that consumes


@pytest.mark.parametrize("access", [f"tr 0 {BAD}", f"tw 0 {BAD} x"], ids=["read", "write"])
def test_each_touch_again(scene: Scene, access: str) -> None:
    p0 = scene.mapper(touch=[BAD])
    scene.poison(BAD)
    for _ in range(5):
        consumes(p0, access, ar(BAD))
    assert p0.cmd(f"tr 0 {BAD - 1}").ok == letter(BAD - 1)


def test_one_event_for_each_touch(scene: Scene) -> None:
    p0 = scene.mapper(touch=[BAD])
    scene.poison(BAD)
    for _ in range(3):
        consumes(p0, f"tr 0 {BAD}", ar(BAD))
    events = scene.signal_events(p0)
    assert [(e["code"], e["result"], e["lsb"], e["address"]) for e in events] == [
        (4, "delivered", 12, p0.addr(0, BAD))
    ] * 3
    assert {(e["tid"], e["comm"]) for e in events} == {(p0.pid, "p0")}


def test_never_touched_before(scene: Scene) -> None:
    p0 = scene.mapper()
    scene.poison(BAD, BAD + FAR)
    consumes(p0, f"tw 0 {BAD} x", ar(BAD))
    consumes(p0, f"tr 0 {BAD + FAR}", ar(BAD + FAR))


def test_dirty_page(scene: Scene) -> None:
    p0 = scene.mapper(touch=[BAD])
    assert p0.cmd(f"tw 0 {BAD} x").ok == "x"
    scene.poison(BAD)
    consumes(p0, f"tr 0 {BAD}", ar(BAD))
    consumes(p0, f"tw 0 {BAD} y", ar(BAD))


def test_one_bad_sector_poisons_its_page(scene: Scene) -> None:
    """One bad block poisons a whole page: a mapping consists of whole pages (`m5-mce-cacheline`)."""
    p0 = scene.mapper(touch=[BAD])
    scene.mount.inject("f", (BAD * PAGE + 1024, 64))
    assert sum(count for _, count in scene.badblocks()) == 1
    consumes(p0, f"tr 0 {BAD}", ar(BAD))


def test_neighbours_are_untouched(scene: Scene) -> None:
    p0 = scene.mapper(touch=[BAD])
    neighbours = [page for page in range(PAGES) if page != BAD]
    for page in neighbours:
        assert p0.cmd(f"tr 0 {page}").ok == letter(page)
    scene.poison(BAD)
    assert [page for page in neighbours if not present(p0, 0, page)] == []
    consumes(p0, f"tr 0 {BAD}", ar(BAD))
    for page in neighbours:
        assert p0.cmd(f"tr 0 {page}").ok == letter(page)
    for page in (BAD - 1, BAD + 1):
        assert p0.cmd(f"tw 0 {page} x").ok == "x"
    assert signals_of(p0) == []


def test_a_loop_of_loads_ends_with_ar_when_the_page_fails(scene: Scene) -> None:
    """A thread that loads in a loop gets AR when the page fails (`m2-mce-ar-late`)."""
    p0 = scene.mapper(touch=[BAD])
    p0.start_spin(0, BAD)
    scene.poison(BAD)
    assert p0.reply().faulted
    assert signals_of(p0) == [ar(BAD)]


# -- the thread that is signalled


def test_early_process_gets_both(early: Scene) -> None:
    p0 = early.mapper(touch=[BAD])
    early.poison(BAD)
    assert signals_of(p0) == [ao(BAD)]
    consumes(p0, f"tr 0 {BAD}", ar(BAD))


@pytest.mark.parametrize("access", [f"ttr 2 0 {BAD}", f"ttw 2 0 {BAD} x"], ids=["read", "write"])
def test_the_thread_that_touches(scene: Scene, access: str) -> None:
    p0 = scene.mapper(touch=[BAD], before=["threads n n e"])
    ask(p0, "mcekill late")
    scene.poison(BAD)
    assert signals_of(p0) == [ao(BAD, thread=3)]
    consumes(p0, access, ar(BAD, thread=2))
    assert [e["tid"] for e in scene.signal_events(p0)] == [p0.tid(3), p0.tid(2)]


@pytest.mark.parametrize("disposition", ["block", "ignore", "default"])
def test_nothing_saves_the_consumer(scene: Scene, disposition: str) -> None:
    p0 = scene.mapper("p0", touch=[BAD], before=[f"sig {disposition}"])
    p1 = scene.mapper("p1", touch=[BAD])
    scene.poison(BAD)
    p0.send(f"tr 0 {BAD}")
    assert p0.wait_death().signal is signal.SIGBUS
    assert [(e["code"], e["result"]) for e in scene.signal_events(p0)] == [(4, "delivered")]
    consumes(p1, f"tr 0 {BAD}", ar(BAD))


def test_blocked_in_the_thread_that_touches(scene: Scene) -> None:
    p0 = scene.mapper(touch=[BAD], before=["sig block", "threads n", "sig unblock"])
    scene.poison(BAD)
    p0.send(f"ttr 1 0 {BAD}")
    assert p0.wait_death().signal is signal.SIGBUS


def test_many_at_once(scene: Scene) -> None:
    actors = scene.mappers(8, touch=[BAD])
    scene.poison(BAD)
    for actor in actors:
        actor.send(f"tr 0 {BAD}")
    for actor in actors:
        assert actor.reply().faulted
        assert signals_of(actor) == [ar(BAD)]
    counts = [len(scene.signal_events(actor)) for actor in actors]
    assert counts == [1] * len(actors)


def test_started_after_the_poison(scene: Scene) -> None:
    scene.poison(BAD)
    p0 = scene.mapper()
    consumes(p0, f"tr 0 {BAD}", ar(BAD))
    assert p0.cmd(f"tr 0 {BAD + 1}").ok == letter(BAD + 1)
    child = p0.fork("p1")
    consumes(child, f"tw 0 {BAD} x", ar(BAD))


def test_mapped_anew_after_the_poison(scene: Scene) -> None:
    """A mapping made after the injection gets AR at the first touch (`g7-new-mapping-clean`)."""
    p0 = scene.mapper(touch=[BAD])
    scene.poison(BAD)
    ask(p0, "mmap 1 0 0 8 private")
    consumes(p0, f"tr 1 {BAD}", ar(BAD, mapping=1))
    consumes(p0, f"tw 1 {BAD} x", ar(BAD, mapping=1))
    ask(p0, "munmap 0")
    ask(p0, f"mmap 0 0 {BAD} 1 ro")
    consumes(p0, "tr 0 0", ar(0))


def test_private_copy_goes_on(scene: Scene) -> None:
    p0 = scene.mapper(touch=[BAD], kind="private")
    assert p0.cmd(f"tw 0 {BAD} c").ok == "c"
    scene.poison(BAD)
    assert p0.cmd(f"tr 0 {BAD}").ok == "c"
    assert p0.cmd(f"tw 0 {BAD} d").ok == "d"
    assert signals_of(p0) == []


def test_a_consumer_traced_by_another_process_gets_bus_adrerr(scene: Scene) -> None:
    p0 = scene.mapper(touch=[BAD])
    scene.poison(BAD)
    with second_tracer(p0.pid):
        assert p0.cmd(f"tr 0 {BAD}").faulted
        (got,) = p0.signals()
        assert (got.sig, got.code, got.addr) == ("SIGBUS", "BUS_ADRERR", f"m0+{BAD * PAGE:#x}")
    events = scene.signal_events(p0)
    assert {e["result"] for e in events} == {"inexact"}
    assert all("trace" in e["reason"] for e in events)
    # On a direct mount the failed access leaves a marker, by which accesses fail for some milliseconds.
    while p0.cmd(f"pagemap 0 {BAD}").res["swap_entry"]:
        pass
    consumes(p0, f"tr 0 {BAD}", ar(BAD))


# -- latent poison


def test_latent_poison_is_found_by_the_touch(scene: Scene) -> None:
    p0 = scene.mapper("p0", touch=[BAD])
    p1 = scene.mapper("p1", touch=[BAD + FAR])
    (outcome,) = scene.mount.inject("f", (BAD * PAGE, PAGE), latent=True)["ranges"]
    assert (outcome["outcome"], outcome["told"]) == ("latent", 0)
    assert scene.badblocks() == []
    assert signals_of(p0) == []
    consumes(p0, f"tr 0 {BAD}", ar(BAD))
    assert scene.badblocks() == [[scene.device_offset("f", BAD) // 512, 8]]
    assert scene.damaged() == [("/f", BAD * PAGE, PAGE)]
    consumes(p1, f"tr 0 {BAD}", ar(BAD))


# -- reflinks


def test_through_every_reflink(scene: Scene) -> None:
    """On a direct mount a store to a shared block copies the block first. The copy fails, which is EIO in
    dax_iomap_copy_around(), so BUS_ADRERR.
    """
    path = scene.mount.path
    scene.mount.run("reflink", path / "f", path / "g", "--dest-offset", "8K")
    p0, p1 = scene.mapper("p0", touch=[BAD]), scene.mapper("p1", "g", pages=PAGES + 2)
    assert p1.cmd(f"tr 0 {BAD + 2}").ok == letter(BAD)
    scene.poison(BAD)
    scene.mount.run("reflink", path / "f", path / "h")
    p2 = scene.mapper("p2", "h")
    for _ in range(2):
        consumes(p0, f"tr 0 {BAD}", ar(BAD))
        consumes(p1, f"tr 0 {BAD + 2}", ar(BAD + 2))
        consumes(p2, f"tr 0 {BAD}", ar(BAD))
    assert p1.cmd(f"tw 0 {BAD + 2} x").faulted
    code = "BUS_ADRERR" if scene.mount.is_direct else "BUS_MCEERR_AR"
    assert [each["code"] for each in signals_of(p1)] == [code]
    assert p1.cmd(f"tr 0 {BAD + 3}").ok == letter(BAD + 1)


def test_an_owner_that_overwrote_its_page_has_another_block(scene: Scene) -> None:
    """Copy on write gives the file another block. The poisoned block stays with the other owner until that
    owner overwrites the page.
    """
    path = scene.mount.path
    scene.mount.run("reflink", path / "f", path / "g")
    p0, p1 = scene.mapper("p0", touch=[BAD]), scene.mapper("p1", "g", touch=[BAD])
    scene.poison(BAD)
    bad = scene.badblocks()
    assert ask(p1, f"pwrite 0 {BAD * PAGE} {PAGE} n") == PAGE
    assert p1.cmd(f"tr 0 {BAD}").ok == "n"
    consumes(p0, f"tr 0 {BAD}", ar(BAD))
    assert refused(p0, f"pread 0 {BAD * PAGE} {PAGE}") == "EIO"
    assert scene.badblocks() == bad
    assert scene.damaged() == [("/f", BAD * PAGE, PAGE)]
    assert ask(p1, "fsync 0") == 0  # until then a crash could restore its link to the poisoned block
    assert ask(p0, f"pwrite 0 {BAD * PAGE} {PAGE} m") == PAGE
    assert p0.cmd(f"tr 0 {BAD}").ok == "m"
    assert p1.cmd(f"tr 0 {BAD}").ok == "n"
    assert scene.badblocks() == []
    assert scene.damaged() == []


# -- the repair


def test_whole_block_write_makes_every_mapping_work_again(scene: Scene) -> None:
    p0, p1, p2 = scene.mappers(3, touch=[BAD])
    scene.poison(BAD)
    consumes(p0, f"tr 0 {BAD}", ar(BAD))
    consumes(p1, f"tr 0 {BAD}", ar(BAD))
    assert ask(p0, f"pwrite 0 {BAD * PAGE} {PAGE} n") == PAGE
    for actor in (p0, p1, p2):
        assert actor.cmd(f"tr 0 {BAD}").ok == "n"
    assert p1.cmd(f"tw 0 {BAD} z").ok == "z"
    assert p0.cmd(f"tr 0 {BAD}").ok == "z"
    assert [signals_of(actor) for actor in (p0, p1, p2)] == [[], [], []]
    scene.poison(BAD)
    consumes(p0, f"tr 0 {BAD}", ar(BAD))
    scene.mount.run("clear", scene.mount.path / "f", "--offset", BAD * PAGE)
    assert p0.cmd(f"tr 0 {BAD}").ok == "0"


def test_a_fault_that_merges_with_a_blocked_sigbus_kills_at_the_faults_address(early: Scene) -> None:
    """force_sig_info_to_task() unblocks SIGBUS; the pending AO then ends the process."""
    other = BAD + FAR
    p0 = early.mapper(touch=[other], before=["sig block"])
    address = p0.addr(0)
    early.poison(other)
    assert ask(p0, "sig pending") == 1
    early.poison(BAD)
    p0.send(f"tr 0 {BAD}")
    assert p0.wait_death().signal is signal.SIGBUS
    at = address + BAD * PAGE
    early.mount.run("settle", early.mount.path)
    told_of = [(e["code"], e["address"], e["result"]) for e in early.signal_events(p0)]
    assert told_of == [(5, address + other * PAGE, "delivered"), (4, at, "gone")]
    killing = f"MCE: Killing p0:{p0.pid} due to hardware memory corruption fault at {at:x}"
    assert killing in early.mount.run("log", early.mount.path, "--dmesg")
