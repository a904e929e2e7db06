"""Repair strategies on direct mounts: a store through a mapping is on the media without a call of the
filesystem, and no strategy may take the store for corruption, or bring older data back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.actor import Actor
from tests.support.mount import DAXEMU
from tests.support.quick import QuickMount, quick_mount_at
from tests.support.zygote import shared_zygote

pytestmark = [
    pytest.mark.mount,
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="direct mounts need root"),
]

PAGE = 4096
PAGES = 8
PATIENCE = 20.0
STRATEGIES = ("mirror", "mirror:checksum=yes", "parity", "parity:slice=4096,data=2")


@pytest.fixture(params=STRATEGIES)
def mount(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[QuickMount]:
    """A direct mount with a strategy and the file ``f``: page i is all letter "A" + i."""
    with repaired(tmp_path, request.param) as made:
        yield made


@contextmanager
def repaired(directory: Path, strategy: str) -> Iterator[QuickMount]:
    with quick_mount_at(directory, shared_zygote(), 64 << 20, mount=False, direct=True) as made:
        made.repair = strategy
        made.mount()
        make_file(made)
        yield made


def make_file(mount: QuickMount) -> None:
    mount.make_file("f", PAGES)


@contextmanager
def mapper(mount: QuickMount) -> Iterator[Actor]:
    """A program that maps all of ``f`` for reading and writing, as mapping 0."""
    with Actor.spawn(cwd=mount.path, wrapper=[*DAXEMU, "run", str(mount.path), "--"]) as actor:
        ask(actor, "open 0 f rw", f"mmap 0 0 0 {PAGES} shared")
        yield actor


def ask(actor: Actor, *commands: str) -> None:
    for command in commands:
        result = actor.cmd(command, PATIENCE).res
        assert result is None or "ok" in result or result.get("ret", -1) >= 0, (command, result)


def first_byte(mount: QuickMount, page: int) -> str:
    """Return the first byte of a page of ``f``, by read(2)."""
    with open(mount.path / "f", "rb", buffering=0) as file:
        return os.pread(file.fileno(), 1, page * PAGE).decode()


def verdicts(mount: QuickMount) -> list[str]:
    return [event["verdict"] for event in mount.events("RepairFinished")]


def corruptions(mount: QuickMount) -> list[dict[str, object]]:
    return mount.events("CorruptionFound")


def poison(mount: QuickMount, page: int) -> None:
    mount.inject("f", (page * PAGE, PAGE))


every = pytest.mark.parametrize("mount", [*STRATEGIES, "async-parity"], indirect=True)


@every
def test_a_store_is_no_corruption(mount: QuickMount) -> None:
    with mapper(mount) as actor:
        ask(actor, "tw 0 1 x")
        assert first_byte(mount, 1) == "x"
        mount.run("scrub", mount.path)
        assert first_byte(mount, 1) == "x"
        assert corruptions(mount) == []


def test_a_synced_store_is_brought_back(mount: QuickMount) -> None:
    with mapper(mount) as actor:
        for letter in "xy":  # after the msync the page is protected again: the second store is seen, too
            ask(actor, f"tw 0 1 {letter}", "msync 0 1 1")
            poison(mount, 1)
            assert first_byte(mount, 1) == letter
        assert verdicts(mount) == ["recovered", "recovered"]


@pytest.mark.parametrize("mount", [*STRATEGIES, "mirror:mapped=trust"], indirect=True)
def test_an_unsynced_store_is_lost_and_never_older_data(mount: QuickMount) -> None:
    with mapper(mount) as actor:
        ask(actor, "tw 0 1 x", "msync 0 1 1", "tw 0 1 y")
        poison(mount, 1)
        assert verdicts(mount) == ["cannot"]
        with pytest.raises(OSError, match="Input/output error"):
            first_byte(mount, 1)


@pytest.mark.parametrize("mount", ["mirror", "parity"], indirect=True)
def test_latent_poison_under_an_unsynced_store_is_lost(mount: QuickMount) -> None:
    with mapper(mount) as actor:
        ask(actor, "tw 0 1 x")
        mount.inject("f", (PAGE, PAGE), latent=True)
        assert actor.cmd("tr 0 1", PATIENCE).res == {"faulted": True}
        assert [signal.recorded()["code"] for signal in actor.signals()] == ["BUS_MCEERR_AR"]
        assert verdicts(mount) == ["cannot"]


def test_a_page_that_is_only_loaded_is_brought_back(mount: QuickMount) -> None:
    with mapper(mount) as actor:
        ask(actor, "tr 0 2")
        poison(mount, 2)
        assert verdicts(mount) == ["recovered"]
        ask(actor, "tw 0 2 z")  # the page that came back is protected as before
        assert first_byte(mount, 2) == "z"
        assert corruptions(mount) == []


def test_a_store_of_the_child_of_a_fork_is_seen(mount: QuickMount) -> None:
    with mapper(mount) as parent:
        ask(parent, "tr 0 1")
        with parent.fork("p1") as child:
            ask(child, "tw 0 1 x", "tw 0 2 y", "msync 0 1 2")
            poison(mount, 1)
            assert first_byte(mount, 1) == "x"
            assert verdicts(mount) == ["recovered"]


@pytest.mark.parametrize("how", ["kill", "powerfail"])
def test_a_store_before_a_crash_is_no_corruption_after_it(mount: QuickMount, how: str) -> None:
    with open(mount.path / "f", "rb") as file:
        os.fsync(file.fileno())
    with mapper(mount) as actor:
        ask(actor, "tw 0 1 x")
        mount.crash(how)
    assert first_byte(mount, 1) == "x"
    assert corruptions(mount) == []
    poison(mount, 1)
    assert first_byte(mount, 1) == "x"
    assert verdicts(mount) == ["recovered"]


def test_the_end_of_the_program_shows_its_stores(mount: QuickMount) -> None:
    with mapper(mount) as actor:
        ask(actor, "tw 0 1 x")
    mount.remount()
    assert first_byte(mount, 1) == "x"
    poison(mount, 1)
    assert first_byte(mount, 1) == "x"
    assert (verdicts(mount), corruptions(mount)) == (["recovered"], [])


@pytest.mark.parametrize("strategy", ["mirror", "parity"])
def test_a_strategy_that_begins_under_a_writer_sees_its_stores(strategy: str, tmp_path: Path) -> None:
    with repaired(tmp_path, "none") as mount, mapper(mount) as actor:
        ask(actor, "tw 0 1 w")  # from now on the page is writable without an event
        mount.run("set", mount.path, f"repair={strategy}")
        ask(actor, "tw 0 1 x")
        assert first_byte(mount, 1) == "x"
        assert corruptions(mount) == []
        ask(actor, "msync 0 1 1")
        poison(mount, 1)
        assert first_byte(mount, 1) == "x"
        assert verdicts(mount) == ["recovered"]


def test_a_copy_elsewhere_is_older_than_a_store(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "f").write_bytes(b"".join(bytes([ord("A") + i]) * PAGE for i in range(PAGES)))
    with repaired(tmp_path, "none") as mount:
        mount.run("set", mount.path, f"repair=reread:path={source}")
        with mapper(mount) as actor:
            ask(actor, "tw 0 1 x", "msync 0 1 1")
            poison(mount, 1)
            poison(mount, 2)
        assert verdicts(mount) == ["cannot", "recovered"]
