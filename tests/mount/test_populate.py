"""System calls that make pages present, over unreadable bytes: each returns, as on DAX."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from daxemu.host.page_cache import populate
from daxemu.ranges import Range
from daxemu.uapi import Ino
from tests.support.actor import TIMEOUT, Actor, compile_victim
from tests.support.mount import dax_mount_at
from tests.support.scene import PAGES, Scene, ar, consumes, letter, second_tracer, signals_of

pytestmark = pytest.mark.mount

BAD = 40
CALLS = {
    "populate": ("mmap 0 0 0 {n} {kind} populate", "0"),
    "locked": ("mmap 0 0 0 {n} {kind} locked", "0"),
    "mlock": ("mlock 0 0 {n}", "ENOMEM"),
    "mlock2": ("mlock2 0 0 {n}", "ENOMEM"),
    "mlockall": ("mlockall current", "0"),
    "future": ("mmap 0 0 0 {n} {kind}", "0"),
}
"""The call, and its expected errno."""


def call(actor: Actor, name: str, kind: str) -> str | None:
    """Make the call over mapping 0 of the whole file; return the errno."""
    text, _ = CALLS[name]
    assert actor.cmd("open 0 f rw").ret == 0
    if name.startswith("mlock"):
        assert actor.cmd(f"mmap 0 0 0 {PAGES} {kind}").ret == 0
    if name == "future":
        assert actor.cmd("mlockall future").ret == 0
    return actor.cmd(text.format(n=PAGES, kind=kind)).errno


@pytest.mark.parametrize("kind", ["shared", "private", "ro"])
@pytest.mark.parametrize("name", CALLS)
def test_known_poison(scene: Scene, name: str, kind: str) -> None:
    scene.poison(BAD, BAD + 1)
    p0 = scene.actor()
    assert call(p0, name, kind) == CALLS[name][1]
    for page in (BAD, BAD + 1):
        consumes(p0, f"tr 0 {page}", ar(page))
    assert p0.cmd(f"tr 0 {BAD - 1}").ok == letter(BAD - 1)
    (event,) = scene.mount.events("PopulateFailed")
    assert event["result"] == ("ENOMEM" if CALLS[name][1] == "ENOMEM" else "ignored")
    assert (event["pid"], event["offset"], event["length"]) == (p0.pid, BAD * 4096, 2 * 4096)


def test_before_the_tracer_has_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracer that takes long to start kills no process. It starts once the mount serves requests."""
    slow = "import sys, time\nuntil = time.monotonic() + 2.5\n"
    slow += "while 'daxemu.host.tracer.process' in sys.orig_argv and time.monotonic() < until: pass\n"
    (tmp_path / "sitecustomize.py").write_text(slow)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with dax_mount_at(tmp_path) as mount, Scene(mount) as scene:
        mount.make_file("f", PAGES)
        with mount.client() as client:
            client.request("inject", ino=(mount.path / "f").stat().st_ino, ranges=[[BAD * 4096, 4096]])
        p0 = scene.actor()
        assert call(p0, "mlock", "shared") == "ENOMEM"
        consumes(p0, f"tr 0 {BAD}", ar(BAD))


@pytest.mark.parametrize("name", CALLS)
def test_latent_poison_is_mapped_unread(scene: Scene, name: str) -> None:
    scene.mount.inject("f", (BAD * 4096, 4096), latent=True)
    p0 = scene.actor()
    assert call(p0, name, "shared") == "0"
    assert scene.badblocks() == []
    consumes(p0, f"tr 0 {BAD}", ar(BAD))
    assert scene.badblocks() != []


@pytest.mark.parametrize("name", CALLS)
def test_a_private_copy_of_latent_poison_reads_it(scene: Scene, name: str) -> None:
    scene.mount.inject("f", (BAD * 4096, 4096), latent=True)
    p0 = scene.actor()
    assert call(p0, name, "private") == CALLS[name][1]
    assert scene.badblocks() != []
    consumes(p0, f"tr 0 {BAD}", ar(BAD))


@pytest.mark.parametrize("kind", ["shared", "private"])
@pytest.mark.parametrize("name", CALLS)
def test_after_removal(scene: Scene, name: str, kind: str) -> None:
    p0 = scene.actor()
    assert p0.cmd("open 0 f rw").ret == 0
    if name.startswith("mlock"):
        assert p0.cmd(f"mmap 0 0 0 {PAGES} {kind}").ret == 0
    if name == "future":
        assert p0.cmd("mlockall future").ret == 0
    scene.mount.json("remove", scene.mount.path)
    scene.mount.sound = False
    assert p0.cmd(CALLS[name][0].format(n=PAGES, kind=kind)).errno == CALLS[name][1]
    for page in (0, BAD, PAGES - 1):
        assert p0.cmd(f"tr 0 {page}").faulted
    assert {signal["code"] for signal in signals_of(p0)} == {"BUS_ADRERR"}


def test_copies_of_before_stay(scene: Scene) -> None:
    p0 = scene.mapper(kind="private")
    assert p0.cmd(f"tw 0 {BAD} x").ok == "x"
    scene.poison(BAD, BAD + 1)
    assert p0.cmd(f"mlock 0 0 {PAGES}").errno == "ENOMEM"
    assert p0.cmd(f"tr 0 {BAD}").ok == "x"
    consumes(p0, f"tr 0 {BAD + 1}", ar(BAD + 1))


def test_another_process_never_keeps_the_pages_of_a_populating_call(scene: Scene) -> None:
    scene.poison(BAD)
    other = scene.mapper("p1")
    p0 = scene.mapper("p0")
    for _ in range(10):
        assert p0.cmd(f"mlock 0 0 {PAGES}").errno == "ENOMEM"
        consumes(other, f"tr 0 {BAD}", ar(BAD))


@pytest.mark.parametrize("kind", ["shared", "private"])
def test_a_traced_process_is_killed_before_a_load_of_the_zeros(scene: Scene, kind: str) -> None:
    scene.poison(BAD)
    p0 = scene.mapper(kind=kind)
    with second_tracer(p0.pid):
        p0.send(f"mlock 0 0 {PAGES}")
        assert str(p0.wait_death()) == "SIGKILL"
    (event,) = scene.mount.events("PopulateFailed")
    assert event["result"] == "killed"


@pytest.mark.parametrize("state", ["known", "latent", "removed"])
@pytest.mark.parametrize(
    ("command", "errnos"),
    [
        (f"madvise 0 0 {PAGES} 22", {"EFAULT", "EHWPOISON"}),
        (f"madvise 0 0 {PAGES} 23", {"EFAULT", "EHWPOISON"}),
        (f"kread 0 {BAD} 1 0 4096", {"EFAULT"}),
        (f"vmsplice 0 {BAD} 4096", {"EFAULT"}),
        (f"fixbuf 0 {BAD} 1", {"EFAULT"}),
    ],
)
def test_other_users_of_get_user_pages_fail(scene: Scene, command: str, errnos: set[str], state: str) -> None:
    """madvise(MADV_POPULATE_READ, _WRITE), a direct read into the mapping, vmsplice(2) and io_uring fail."""
    scene.mount.make_file("g", 2)
    p0 = scene.mapper(before=["open 1 g direct"])
    if state == "removed":
        scene.mount.json("remove", scene.mount.path)
        scene.mount.sound = False
    else:
        scene.mount.inject("f", (BAD * 4096, 4096), latent=state == "latent")
    result = p0.cmd(command)
    if result.errno == "ENOSYS" or (command.startswith("fixbuf") and result.errno == "EPERM"):
        pytest.skip(f"{command}: {result.errno} on this kernel")
    assert result.ret == -1
    assert result.errno in errnos | ({"EIO"} if state == "removed" else set())


def test_reading_it_out_of_another_process_fails(scene: Scene) -> None:
    scene.poison(BAD)
    p0, p1 = scene.mapper("p0"), scene.mapper("p1")
    assert p1.pvm("pvmread", p0, 0, BAD, 4096).errno == "EFAULT"


def test_a_thread_that_asks_again_and_again_is_an_event(scene: Scene) -> None:
    scene.poison(BAD)
    p0 = scene.actor()
    assert p0.cmd("open 0 f rw").ret == 0
    for _ in range(110):
        assert p0.cmd(f"pread 0 {BAD * 4096} 4096").errno == "EIO"
    assert [e["times"] for e in scene.mount.events("FaultRepeated") if e["pid"] == p0.pid] == [100]


@contextmanager
def peeking(path: Path, page: int) -> Iterator[subprocess.Popen[str]]:
    """Run the loop of tests/victims/peeker.c."""
    command: list[str | Path] = [compile_victim("peeker"), path, str(page)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peeker:
        try:
            assert peeker.stdout is not None
            assert peeker.stdout.readline() == "ready\n"
            yield peeker
        finally:
            peeker.kill()


def test_a_parallel_loader_sees_zeros_within_a_call_at_most(scene: Scene) -> None:
    """The named limit of docs/fidelity.md: one window a call, which ends before the call does."""
    calls = 50
    scene.poison(BAD)
    p0 = scene.mapper()
    with peeking(scene.mount.path / "f", BAD) as peeker:
        for _ in range(calls):
            assert p0.cmd(f"mlock 0 {BAD} 1").errno == "ENOMEM"
        said = peeker.communicate(timeout=TIMEOUT)[0].split()
    seen = dict(zip(said[::2], map(int, said[1::2]), strict=True))
    print(seen)
    assert seen["faults"] > 0
    assert seen["spans"] <= calls
    events = scene.mount.events("PopulateFailed")
    assert len(events) == calls
    assert {pid for event in events for pid in event["exposed"]} <= {peeker.pid}
    consumes(p0, f"tr 0 {BAD}", ar(BAD))


def test_processes_with_the_page_mapped_or_present_are_found(scene: Scene) -> None:
    status = (scene.mount.path / "f").stat()
    p0, p1, p2 = scene.mapper("p0"), scene.mapper("p1", touch=[BAD]), scene.mapper("p2")
    pages = Range(BAD, BAD + 1)
    others = populate.others_mapping(
        p0.pid, (os.major(status.st_dev), os.minor(status.st_dev)), Ino(status.st_ino), pages
    )
    assert {task.pid for task in others} == {p1.pid, p2.pid}
    assert populate.having_present(others) == [p1.pid]
