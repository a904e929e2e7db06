"""Surprise removal, and the loss of the filesystem's own records: the processes concerned are signalled, then
every access ends in EIO.
"""

from __future__ import annotations

import errno
import os
import signal

import pytest

from daxemu.mm.memmap import Memmap
from daxemu.mm.pfn_kinds import PfnKind
from daxemu.private_path import PrivatePath
from tests.support.actor import Actor
from tests.support.mount import DaxMount, daxemu
from tests.support.scene import (
    PAGE,
    PAGES,
    Scene,
    ask,
    is_plain_sigbus,
    letter,
    present,
    refused,
    second_tracer,
    signals_of,
)

pytestmark = pytest.mark.mount


def remove(scene: Scene) -> int:
    """Run ``daxemu remove``; return the number of signalled processes."""
    return int(scene.mount.json("remove", scene.mount.path)["told"])


def state(scene: Scene) -> str:
    return str(scene.mount.json("status", scene.mount.path)["state"])


def faults_plainly(actor: Actor, command: str, addr: str) -> None:
    """The device is gone: no memory failure any more, but BUS_ADRERR at the address."""
    result = actor.cmd(command)
    assert result.faulted, f"{actor.name}: {command}: {result}"
    got = signals_of(actor)
    assert [(s["sig"], s["code"], s["addr"]) for s in got] == [("SIGBUS", "BUS_ADRERR", addr)]


def is_signalled_once(actor: Actor, pages: set[int]) -> None:
    """Check for one AO, at one of the pages that the process had present."""
    (got,) = signals_of(actor)
    assert (got["code"], got["lsb"], got["thread"], got["how"]) == ("BUS_MCEERR_AO", 12, 0, "async")
    assert got["addr"] in {f"m0+{page * PAGE:#x}" for page in pages}


# -- processes that are signalled


def test_every_process_with_a_page_present_is_signalled_whatever_the_policy(scene: Scene) -> None:
    default = scene.mapper("p0", touch=[1])
    late = scene.mapper("p1", touch=[40, 80], before=["mcekill late"])
    early = scene.mapper("p2", touch=[1], before=["mcekill early"])
    scene.mount.make_file("g", PAGES)
    other = scene.mapper("p3", "g", touch=[7])
    untouched = scene.mapper("p4")
    opener = scene.actor("p5")
    ask(opener, "open 0 f rw")
    stranger = scene.actor("p6")
    around = {p for p in range(PAGES) if present(late, 0, p)}
    assert remove(scene) == 4
    is_signalled_once(late, around)
    for actor in (default, early, other):
        is_signalled_once(actor, set(range(PAGES)))
    for actor in (untouched, opener, stranger):
        assert signals_of(actor) == []
    for actor in (default, late, early, other):
        assert not any(present(actor, 0, page) for page in range(PAGES))


def test_the_first_page_present_is_named(scene: Scene) -> None:
    """The mapping is one page, so no neighbour can be present."""
    p0 = scene.mapper(touch=[0], first=17, pages=1)
    assert remove(scene) == 1
    is_signalled_once(p0, {0})


def test_default_disposition_dies_and_ignoring_lives(scene: Scene) -> None:
    p0 = scene.mapper("p0", touch=[1], before=["sig default"])
    p1 = scene.mapper("p1", touch=[1], before=["sig ignore"])
    remove(scene)
    assert p0.wait_death().signal is signal.SIGBUS
    assert signals_of(p1) == []
    p1.send("tr 0 1")
    assert p1.wait_death().signal is signal.SIGBUS


def test_events_and_log(scene: Scene) -> None:
    p0 = scene.mapper("p0", touch=[1])
    remove(scene)
    (event,) = scene.mount.events("DeviceRemoved")
    assert event["told"] == 1
    (shutdown,) = scene.mount.events("FilesystemShutdown")
    assert "about to be removed" in shutdown["reason"]
    assert [e["result"] for e in scene.signal_events(p0)] == ["delivered"]
    lines = scene.mount.run("log", scene.mount.path, "--dmesg")
    warning, gone = lines.find("DAX active at remove"), lines.find("Device is about to be removed!")
    assert 0 <= warning < gone
    assert f"Sending SIGBUS to p0:{p0.pid} due to hardware memory corruption" in lines


# -- state after the removal


def test_everything_is_eio_and_faults_are_bus_adrerr(scene: Scene) -> None:
    p0, p1 = scene.mapper("p0", touch=[1]), scene.mapper("p1")
    ask(p0, "open 3 f direct")
    remove(scene)
    signals_of(p0)
    assert state(scene) == "removed"
    for command in (
        f"pread 0 0 {PAGE}",
        f"pread 3 0 {PAGE}",
        f"pwrite 0 0 {PAGE} x",
        f"pwrite 3 0 {PAGE} x",
        "pwrite 0 100 10 x",
        "fsync 0",
        "trunc 0 0",
        "open 4 f rw",
        "open 5 new creat",
    ):
        assert refused(p0, command) == "EIO", command
    for page in (1, 0, 100):
        faults_plainly(p0, f"tr 0 {page}", f"m0+{page * PAGE:#x}")
        faults_plainly(p1, f"tw 0 {page} x", f"m0+{page * PAGE:#x}")
    assert [e["code"] for e in scene.signal_events(p1)] == []
    path = scene.mount.path
    for verb in (path.joinpath("d").mkdir, path.joinpath("f").unlink, lambda: list(path.iterdir())):
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            verb()


def test_dirty_pages_do_not_hold_it_up(scene: Scene) -> None:
    p0, p1 = scene.mappers(2, touch=[1])
    for page in range(0, PAGES, 3):
        assert p0.cmd(f"tw 0 {page} x").ok == "x"
    assert remove(scene) == 2
    is_signalled_once(p0, set(range(PAGES)))
    is_signalled_once(p1, set(range(PAGES)))
    faults_plainly(p0, "tr 0 0", "m0+0x0")
    assert refused(p0, "fsync 0") == "EIO"


def test_removed_twice(scene: Scene) -> None:
    remove(scene)
    error = scene.mount.run("remove", scene.mount.path, status=7)
    assert error.startswith("daxemu: ")
    assert "removed" in error
    assert error.count("\n") == 1
    error = scene.mount.run("inject", scene.mount.path, "--offset", 0, status=7)
    assert "removed" in error
    assert len(scene.mount.events("DeviceRemoved")) == 1


def test_unmount_and_mount_again(scene: Scene) -> None:
    """All data of the device is present and sound when the device comes back."""
    path = scene.mount.path
    (path / "d").mkdir()
    (path / "d" / "note").write_bytes(b"kept")
    p0 = scene.mapper(touch=[1])
    remove(scene)
    signals_of(p0)
    scene.mount.run("umount", path, status=4)
    p0.close()
    scene.mount.umount()
    daxemu("fsck", scene.mount.device)
    scene.mount.mount_again()
    assert state(scene) == "mounted"
    assert (path / "d" / "note").read_bytes() == b"kept"
    p1 = scene.mapper(touch=[1])
    assert p1.cmd("pread 0 0 8192").pages == "AB"
    assert signals_of(p1) == []


def test_struct_pages_are_gone_with_the_device(scene: Scene) -> None:
    """A new walker finds no struct page of the device, poisoned or not; a running walker finds the old ones,
    or none.
    """
    device = scene.mount.device
    scene.poison(3)
    looking = Memmap.open(PrivatePath.at(device) / "struct_page")
    before = looking.count()
    total = before[PfnKind.ZONE_DEVICE, False] + 1
    remove(scene)
    assert before[PfnKind.ZONE_DEVICE, True] == 1
    assert set(looking.count()) == {(PfnKind.HOLE, False)}
    shown = scene.mount.json("page-types", device)
    assert [(t["kind"], t["names"]) for t in shown["types"]] == [("hole", ["nopage"])]
    assert shown["types"][0]["pages"] == sum(before.values()) > total
    scene.mount.umount()
    assert "not mounted" in daxemu("page-types", device, status=3)
    looking.close()
    scene.mount.mount_again()
    (here,) = [t for t in scene.mount.json("page-types", device)["types"] if t["kind"] == "zone device"]
    assert here["pages"] == total


@pytest.mark.parametrize("dax_mount", ["6T"], indirect=True)
def test_six_tebibytes(scene: Scene) -> None:
    """One call covers the whole device, of any size; earlier poison makes no difference."""
    scene.mount.inject("", (5 << 40, 1 << 40))
    p0 = scene.mapper(touch=[1, 100])
    assert remove(scene) == 1
    is_signalled_once(p0, set(range(PAGES)))
    faults_plainly(p0, "tr 0 100", f"m0+{100 * PAGE:#x}")
    assert len(scene.mount.events("MemoryFailureHandled")) == 1  # a removal is none


def test_a_victim_traced_by_another_process_gets_a_plain_sigbus(scene: Scene) -> None:
    p0 = scene.mapper(touch=[1])
    with second_tracer(p0.pid):
        assert remove(scene) == 1
        assert is_plain_sigbus(p0.wait_signal())


# -- the filesystem's own records


def test_damaged_metadata_shuts_the_filesystem_down(scene: Scene) -> None:
    """Failed, EUCLEAN in the log, EIO from then on; no process is signalled, no page is unmapped
    (`s0-metadata`).
    """
    scene.mount.sound = False
    p0 = scene.mapper(touch=[1], before=["mcekill early"])
    (outcome,) = scene.mount.inject("", (0, PAGE))["ranges"]
    assert (outcome["outcome"], outcome["told"]) == ("Failed", 0)
    assert signals_of(p0) == []
    report = scene.mount.json("status", scene.mount.path)
    assert report["state"] == "shut down"
    assert report["counters"]["failed"] == 1
    for command in (f"pwrite 0 0 {PAGE} r", "fsync 0", "open 4 new creat"):
        assert refused(p0, command) == "EIO", command
    assert refused(p0, f"pread 0 {100 * PAGE} {PAGE}") == "EIO"
    (handled,) = scene.mount.events("MemoryFailureHandled")
    assert handled["outcome"] == "Failed"
    assert handled["error"]
    lines = scene.mount.run("log", scene.mount.path, "--dmesg")
    assert "Corruption of on-disk metadata" in lines
    assert "Shutting down filesystem" in lines
    assert "recovery action for dax page: Failed" in lines


def test_poison_in_free_blocks_signals_no_process(early: Scene) -> None:
    """Poison in free blocks: Recovered, no signal, and the filesystem goes on (`s0-metadata`)."""
    p0 = early.mapper(touch=[1])
    (outcome,) = early.mount.inject("", ((1 << 30) - 64 * PAGE, 64 * PAGE))["ranges"]
    assert (outcome["outcome"], outcome["told"]) == ("Recovered", 0)
    assert signals_of(p0) == []
    assert state(early) == "mounted"
    assert early.damaged() == []
    assert p0.cmd("tr 0 1").ok == letter(1)
    assert ask(p0, f"pwrite 0 0 {PAGE} q") == PAGE
    assert ask(p0, "fsync 0") == 0


def test_a_damaged_file_and_damaged_metadata_in_one_range(early: Scene) -> None:
    """The failure covers the whole device in one call, without a removal."""
    early.mount.sound = False
    p0 = early.mapper(touch=[1])
    (outcome,) = early.mount.inject("", (0, 1 << 30))["ranges"]
    assert outcome["outcome"] == "Failed"
    assert signals_of(p0) != []
    assert state(early) == "shut down"


def test_unmount_after_a_shutdown(dax_mount: DaxMount) -> None:
    dax_mount.sound = False
    dax_mount.make_file("f", 8)
    dax_mount.inject("", (0, PAGE))
    dax_mount.umount()
