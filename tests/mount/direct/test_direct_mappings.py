"""Mappings of the media by real programs under ``daxemu run``: what only a direct mount can do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.host.direct.supervised import agents
from tests.support.mount import DAXEMU, PATIENCE, DaxMount
from tests.support.scene import (
    PAGE,
    PAGES,
    Scene,
    ao,
    append_until_full,
    ar,
    ask,
    consumes,
    letter,
    present,
    signals_of,
)

pytestmark = pytest.mark.mount


def test_a_store_is_in_read_2_and_in_the_media_at_once(scene: Scene) -> None:
    p0 = scene.mapper()
    assert p0.cmd("tw 0 3 !").ok == "!"
    assert (scene.mount.path / "f").read_bytes()[3 * PAGE : 3 * PAGE + 2] == b"!D"
    media = (scene.mount.device / "media").read_bytes()
    assert media[scene.device_offset("f", 3)] == ord("!")


def test_a_write_is_in_the_mapping_at_once(scene: Scene) -> None:
    p0 = scene.mapper(touch=[2])
    with (scene.mount.path / "f").open("r+b", buffering=0) as file:
        file.seek(2 * PAGE)
        file.write(b"W")
    assert p0.cmd("tr 0 2").ok == "W"


def test_two_processes_share_a_page(scene: Scene) -> None:
    p0, p1 = scene.mappers(2)
    assert p0.cmd("tw 0 1 x").ok == "x"
    assert p1.cmd("tr 0 1").ok == "x"


def test_one_touch_makes_one_page_present(scene: Scene) -> None:
    p0 = scene.mapper(touch=[5])
    assert [page for page in range(PAGES) if present(p0, 0, page)] == [5]


def test_a_reflink_is_a_snapshot_of_a_mapped_file(scene: Scene) -> None:
    p0, p1 = scene.mappers(2, touch=[1])
    scene.mount.run("reflink", scene.mount.path / "f", scene.mount.path / "g")
    assert present(p0, 0, 1)
    assert p0.cmd("tw 0 1 !").ok == "!"
    assert p1.cmd("tr 0 1").ok == "!"
    assert (scene.mount.path / "g").read_bytes()[PAGE : PAGE + 1] == letter(1).encode()
    assert scene.device_offset("f", 1) != scene.device_offset("g", 1)
    assert scene.device_offset("f", 2) == scene.device_offset("g", 2)


def test_a_store_into_a_hole_allocates(scene: Scene) -> None:
    path = scene.mount.path / "h"
    path.touch()
    os.truncate(path, 8 * PAGE)
    p0 = scene.mapper(file="h", pages=8)
    assert p0.cmd("tr 0 3").ok == "0"
    assert path.stat().st_blocks == 0
    assert p0.cmd("tw 0 3 n").ok == "n"
    assert path.stat().st_blocks == 8
    assert path.read_bytes()[3 * PAGE : 3 * PAGE + 1] == b"n"


@pytest.mark.parametrize("dax_mount", ["32M"], indirect=True)
def test_a_store_into_a_hole_of_a_full_device_is_sigbus(scene: Scene) -> None:
    path = scene.mount.path / "h"
    path.touch()
    os.truncate(path, 8 * PAGE)
    append_until_full(scene.mount.path / "large", b"x")
    p0 = scene.mapper(file="h", pages=8)
    assert p0.cmd("tw 0 3 n").faulted
    assert [(each["code"], each["addr"]) for each in signals_of(p0)] == [("BUS_ADRERR", f"m0+{3 * PAGE:#x}")]
    assert p0.cmd("tr 0 2").ok == "0"


def test_truncation_and_growth(scene: Scene) -> None:
    path = scene.mount.path / "f"
    p0 = scene.mapper(touch=[0, 1, 2])
    os.truncate(path, PAGE)
    assert p0.cmd("tr 0 1").faulted
    assert [each["code"] for each in signals_of(p0)] == ["BUS_ADRERR"]
    os.truncate(path, 3 * PAGE)
    assert p0.cmd("tr 0 1").ok == "0"
    assert p0.cmd("tw 0 2 n").ok == "n"
    assert path.read_bytes()[2 * PAGE : 2 * PAGE + 1] == b"n"


def test_the_child_of_a_fork_maps_the_media(scene: Scene) -> None:
    p0 = scene.mapper(touch=[1])
    child = p0.fork("c0")
    assert child.cmd("tw 0 1 c").ok == "c"
    assert p0.cmd("tr 0 1").ok == "c"
    scene.mount.run("reflink", scene.mount.path / "f", scene.mount.path / "g")
    assert child.cmd("tw 0 1 d").ok == "d"
    assert p0.cmd("tr 0 1").ok == "d"
    assert (scene.mount.path / "g").read_bytes()[PAGE : PAGE + 1] == b"c"


def test_poison_takes_the_page_from_every_process(early: Scene) -> None:
    p0, p1 = early.mappers(2, touch=[1, 2])
    p2 = early.mapper("p2", touch=[2])
    early.poison(1)
    assert (signals_of(p0), signals_of(p1), signals_of(p2)) == ([ao(1)], [ao(1)], [])
    assert [present(each, 0, 1) for each in (p0, p1)] == [False, False]
    assert [present(each, 0, 2) for each in (p0, p1, p2)] == [True, True, True]
    for each in (p0, p1, p2):
        consumes(each, "tr 0 1", ar(1))


def test_a_write_of_the_page_clears_the_poison(scene: Scene) -> None:
    p0 = scene.mapper(touch=[1])
    scene.poison(1)
    consumes(p0, "tr 0 1", ar(1))
    with (scene.mount.path / "f").open("r+b", buffering=0) as file:
        file.seek(PAGE)
        file.write(b"H" * PAGE)
    assert p0.cmd("tr 0 1").ok == "H"
    assert p0.cmd("tw 0 1 I").ok == "I"
    assert scene.badblocks() == []


def test_after_a_removal_every_access_is_sigbus(early: Scene) -> None:
    early.mount.sound = False
    p0 = early.mapper(touch=[1])
    early.mount.run("remove", early.mount.path)
    assert [each["code"] for each in signals_of(p0)] == ["BUS_MCEERR_AO"]
    assert p0.cmd("tr 0 1").faulted
    assert [each["code"] for each in signals_of(p0)] == ["BUS_ADRERR"]


def test_a_killed_program_leaves_no_agent(scene: Scene) -> None:
    p0 = scene.mapper(touch=[1])
    assert agents(scene.mount.device / "media")
    p0.kill()
    deadline = time.monotonic() + PATIENCE
    while agents(scene.mount.device / "media"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    p1 = scene.mapper("p1", touch=[1])
    assert p1.cmd("tw 0 1 y").ok == "y"


def test_an_unmount_by_force_ends_the_mappings(scene: Scene) -> None:
    p0 = scene.mapper(touch=[1])
    scene.mount.umount("--force")
    assert p0.cmd("tr 0 1").faulted
    assert [each["code"] for each in signals_of(p0)] == ["BUS_ADRERR"]


def test_a_killed_supervisor_ends_the_mappings(scene: Scene) -> None:
    scene.mount.sound = False
    p0 = scene.mapper(touch=[1])
    supervisor = scene.mount.json("status", scene.mount.path)["pid"]
    os.kill(supervisor, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while agents(scene.mount.device / "media"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert p0.cmd("tr 0 1").faulted
    assert [each["code"] for each in signals_of(p0)] == ["BUS_ADRERR"]


def test_a_program_outside_of_run_is_refused(scene: Scene) -> None:
    scene.mount.is_direct = False  # an actor without daxemu run
    p0 = scene.actor()
    ask(p0, "open 0 f rw")
    assert p0.cmd(f"mmap 0 0 0 {PAGES} shared").errno == "ENODEV"
    ask(p0, f"mmap 0 0 0 {PAGES} private")


def test_shared_mappings_by_python(dax_mount: DaxMount) -> None:
    dax_mount.make_file("f", 4)
    code = """
import mmap
with open("f", "r+b") as file, mmap.mmap(file.fileno(), 0) as m:
    m[4096:4102] = b"python"
    assert file.read()[4096:4102] == b"python"
    m.flush()
"""
    run_python(dax_mount, code)
    assert (dax_mount.path / "f").read_bytes()[PAGE : PAGE + 6] == b"python"


def test_sqlite_with_a_write_ahead_log(dax_mount: DaxMount) -> None:
    code = """
import sqlite3
for mode in ("wal", "delete"):
    db = sqlite3.connect("db")
    assert db.execute(f"pragma journal_mode={mode}").fetchone() == (mode,)
    db.execute("pragma mmap_size=1000000")
    db.execute("create table if not exists t (x)")
    db.executemany("insert into t values (?)", [(str(n) * 50,) for n in range(500)])
    db.commit()
    assert db.execute("pragma integrity_check").fetchone() == ("ok",)
    db.close()
"""
    run_python(dax_mount, code)


def run_python(mount: DaxMount, code: str) -> None:
    """Run Python code under ``daxemu run`` in the mount's root directory."""
    argv = [*DAXEMU, "run", str(mount.path), "--", sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=mount.path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
