"""Rules on a real mount: the operation that fires a rule sees the fault, or its own success.

The kernel requests a page again whose read failed, so a failed read counts twice in page-cache mode.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from daxemu.errors import InvalidArgument
from daxemu.protocol import AddRule, Damaged, DeleteRules, ListRules
from daxemu.rule import ALONE, Action, ClearAction, InjectAction, RuleReport, parse_on
from daxemu.uapi import PAGE_SIZE
from tests.support.mount import DaxMount
from tests.support.quick import QuickMount
from tests.support.syscalls import clone_range

pytestmark = pytest.mark.mount
PAGES = 8


def add(mount: DaxMount, on: str, *then: Action, **options: Any) -> str:
    by, after = options.pop("by", None), options.pop("after", False)
    with mount.client() as client:
        return client.ask(AddRule(parse_on(on, by, after=after), list(then), **options)).name


def rules(mount: DaxMount) -> list[RuleReport]:
    with mount.client() as client:
        return client.ask(ListRules()).rules


def fired(mount: DaxMount) -> list[SimpleNamespace]:
    return [SimpleNamespace(**event) for event in mount.events("RuleFired")]


def damaged(mount: DaxMount) -> list[tuple[str, int]]:
    """Return path and offset of each damaged range."""
    with mount.client() as client:
        return [(found.path, found.offset) for found in client.ask(Damaged()).files]


def answered(mount: DaxMount) -> int:
    """Return the number of requests that C has answered."""
    return int(mount.json("status", mount.path)["layouts"].split()[0])


def make(mount: DaxMount, name: str = "db") -> Path:
    path = mount.path / name
    path.write_bytes(b"".join(bytes([65 + page]) * PAGE_SIZE for page in range(PAGES)))
    return path


def open_past_the_cache(path: Path) -> int:
    """Open a file so that each pread(2) of a page is one request."""
    fd = os.open(path, os.O_RDWR)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return fd


def errors_of_reads(fd: int) -> list[int]:
    """Read each page once; return the errno of each, 0 for success."""
    found = []
    for page in range(PAGES):
        try:
            assert os.pread(fd, PAGE_SIZE, page * PAGE_SIZE) == bytes([65 + page]) * PAGE_SIZE
            found.append(0)
        except OSError as error:
            found.append(error.errno or -1)
    return found


def test_the_third_read_meets_poison(quick_mount: QuickMount) -> None:
    db = make(quick_mount)
    make(quick_mount, "other")
    add(quick_mount, "read:db:3", InjectAction())
    other = open_past_the_cache(quick_mount.path / "other")
    assert errors_of_reads(other) == [0] * PAGES
    fd = open_past_the_cache(db)
    assert errors_of_reads(fd) == [0, 0, errno.EIO] + [0] * (PAGES - 3)
    (event,) = fired(quick_mount)
    assert (event.op, event.path, event.pid, event.tid) == ("read", "/db", os.getpid(), os.getpid())
    assert (event.offset, event.length, event.number) == (2 * PAGE_SIZE, PAGE_SIZE, 3)
    assert [(rule.matched, rule.fired) for rule in rules(quick_mount)] == [(PAGES + 1, 1)]
    os.close(fd)
    os.close(other)


def test_each_read_from_the_second_on(quick_mount: QuickMount) -> None:
    fd = open_past_the_cache(make(quick_mount))
    add(quick_mount, "read:db:2+3", InjectAction())
    assert errors_of_reads(fd) == [0, errno.EIO, 0, errno.EIO, 0, errno.EIO, 0, errno.EIO]
    os.close(fd)


def test_after_a_write_the_writer_has_succeeded(quick_mount: QuickMount) -> None:
    add(quick_mount, "write:log:2", InjectAction(), after=True)
    fd = os.open(quick_mount.path / "log", os.O_RDWR | os.O_CREAT)
    assert [os.pwrite(fd, b"x" * PAGE_SIZE, page * PAGE_SIZE) for page in range(3)] == [PAGE_SIZE] * 3
    with quick_mount.client() as client:
        client.settle()
    assert damaged(quick_mount) == [("/log", PAGE_SIZE)]
    os.close(fd)


def test_before_a_write_of_a_hole_there_is_no_media(quick_mount: QuickMount) -> None:
    add(quick_mount, "write:log:1", InjectAction(), name="early")
    (quick_mount.path / "log").write_bytes(b"x")
    (event,) = quick_mount.events("RuleFailed")
    assert (event["rule"], event["action"]) == ("early", "poison in the bytes of the operation")
    assert "hole" in event["reason"]


def test_a_page_of_the_file_that_is_synced(quick_mount: QuickMount) -> None:
    add(quick_mount, "fsync:*.log", InjectAction(ranges=[(PAGE_SIZE, 1)], of_file=True))
    for name in ("a.db", "b.log"):
        fd = os.open(quick_mount.path / name, os.O_RDWR | os.O_CREAT)
        os.write(fd, b"x" * 2 * PAGE_SIZE)
        os.fsync(fd)
        os.close(fd)
    assert damaged(quick_mount) == [("/b.log", PAGE_SIZE)]


@pytest.mark.parametrize(
    ("op", "act"),
    [
        ("open", lambda path: path.open().close()),
        ("create", lambda path: path.with_name("db2").touch()),
        ("rename", lambda path: path.rename(path.with_name("db2"))),
        ("unlink", lambda path: path.unlink()),
        ("truncate", lambda path: os.truncate(path, 10)),
        ("mkdir", lambda path: path.with_name("db2").mkdir()),
    ],
)
def test_operations_on_names(quick_mount: QuickMount, op: str, act: Any) -> None:
    """The fault is there when the operation returns."""
    db = make(quick_mount)
    make(quick_mount, "victim")
    victim = (quick_mount.path / "victim").stat().st_ino
    add(quick_mount, f"{op}:db*", InjectAction(ranges=[(0, 1)], ino=victim))
    act(db)
    assert [event.op for event in fired(quick_mount)] == [op]
    assert damaged(quick_mount) == [("/victim", 0)]


def test_a_clone_and_an_allocation(quick_mount: QuickMount) -> None:
    db = make(quick_mount)
    add(quick_mount, "clone:copy", InjectAction(), after=True)
    add(quick_mount, "fallocate:copy", InjectAction(), after=True)
    with db.open("rb") as source, (quick_mount.path / "copy").open("wb") as target:
        clone_range(target.fileno(), source.fileno(), 0, PAGE_SIZE, 0)
        os.posix_fallocate(target.fileno(), 4 * PAGE_SIZE, PAGE_SIZE)
    assert [(event.op, event.offset) for event in fired(quick_mount)] == [
        ("clone", 0),
        ("fallocate", 4 * PAGE_SIZE),
    ]
    assert set(damaged(quick_mount)) == {("/db", 0), ("/copy", 0), ("/copy", 4 * PAGE_SIZE)}


def test_only_one_process_fires_the_rule(quick_mount: QuickMount) -> None:
    db = make(quick_mount)
    add(quick_mount, "open:db:1+", ALONE["stop"], by="dd")
    db.open().close()
    assert fired(quick_mount) == []
    command = ["dd", f"if={db}", "of=/dev/null", "status=none"]
    child = subprocess.Popen(command)
    _, status = os.waitpid(child.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert os.WSTOPSIG(status) == signal.SIGSTOP
    os.kill(child.pid, signal.SIGCONT)
    assert child.wait(20) == 0
    assert [(event.comm, event.pid) for event in fired(quick_mount)] == [("dd", child.pid)]


def test_a_load_meets_poison(quick_mount: QuickMount) -> None:
    db = make(quick_mount)
    os.close(open_past_the_cache(db))
    add(quick_mount, "load:db", InjectAction())
    load = "import mmap, sys; f = open(sys.argv[1]); print(mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)[0])"
    done = subprocess.run([sys.executable, "-c", load, str(db)], capture_output=True, timeout=30, check=False)
    assert done.returncode == -signal.SIGBUS
    assert [(event.op, event.offset) for event in fired(quick_mount)] == [("load", 0)]


def test_a_power_failure_after_the_second_sync(dax_mount: DaxMount) -> None:
    add(dax_mount, "fsync:log:2", ALONE["powerfail"], after=True)
    fd = os.open(dax_mount.path / "log", os.O_RDWR | os.O_CREAT)
    for byte in (b"a", b"b"):
        os.write(fd, byte)
        os.fsync(fd)
    with pytest.raises(OSError, match=r"Errno (103|107)"):
        os.write(fd, b"c")
    with pytest.raises(OSError, match=r"Errno (103|107)"):
        os.close(fd)
    dax_mount.mount()  # waits for the end of the last supervisor
    assert (dax_mount.path / "log").read_bytes() == b"ab"


def test_a_removal_before_a_read(quick_mount: QuickMount) -> None:
    fd = open_past_the_cache(make(quick_mount))
    add(quick_mount, "read:db:2", ALONE["remove"])
    assert errors_of_reads(fd) == [0] + [errno.EIO] * (PAGES - 1)
    os.close(fd)


def test_rules_are_listed_and_deleted(quick_mount: QuickMount) -> None:
    db = make(quick_mount)
    first = add(quick_mount, "read:db", InjectAction())
    add(quick_mount, "write:db", ClearAction(), name="heal")
    with pytest.raises(InvalidArgument, match="heal"):
        add(quick_mount, "write:db", ClearAction(), name="heal")
    assert [rule.name for rule in rules(quick_mount)] == [first, "heal"]
    with quick_mount.client() as client:
        with pytest.raises(InvalidArgument, match="no rule 'x'"):
            client.ask(DeleteRules(["x"]))
        assert [rule.name for rule in client.ask(DeleteRules([first])).rules] == [first]
        assert [rule.name for rule in client.ask(DeleteRules()).rules] == ["heal"]
    fd = open_past_the_cache(db)
    assert errors_of_reads(fd) == [0] * PAGES
    os.close(fd)
    assert quick_mount.events("PoisonInjected") == []


@pytest.mark.parametrize(
    ("on", "then"),
    [("open:db", [InjectAction()]), ("read:db", []), ("read:db:1", [InjectAction(ranges=[(1 << 60, 1)])])],
)
def test_rules_that_cannot_work_are_refused(quick_mount: QuickMount, on: str, then: list[Action]) -> None:
    with pytest.raises(InvalidArgument):
        add(quick_mount, on, *then)
    assert rules(quick_mount) == []


def test_without_rules_c_answers_reads(quick_mount: QuickMount) -> None:
    """A rule keeps layouts only from the files that it names."""
    fds = {name: open_past_the_cache(make(quick_mount, name)) for name in ("db", "other")}
    name = add(quick_mount, "read:db:100", InjectAction())
    counts = []
    for _ in range(2):
        errors_of_reads(fds["other"])
        os.posix_fadvise(fds["other"], 0, 0, os.POSIX_FADV_DONTNEED)
    before = answered(quick_mount)
    for fd in (fds["db"], fds["other"]):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        errors_of_reads(fd)
        counts.append(answered(quick_mount) - before)
    assert counts[0] == 0
    assert counts[1] >= PAGES
    with quick_mount.client() as client:
        client.ask(DeleteRules([name]))
    for fd in fds.values():
        os.close(fd)
