"""Children of fork(2) as victims of failures: known from their first instruction, on every mount."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.actor import Actor
from tests.support.mount import DAXEMU, DaxMount, dax_mount_at
from tests.support.scene import PAGE, PAGES, Scene, ao, ar, ask, consumes, letter, present, signals_of

pytestmark = [pytest.mark.mount, pytest.mark.timeout(120)]

ROUNDS = 10


@pytest.fixture
def second(tmp_path: Path) -> Iterator[DaxMount]:
    """Another direct mount."""
    (tmp_path / "second").mkdir()
    with dax_mount_at(tmp_path / "second", "64M", mount=False) as made:
        made.mount("--direct")
        made.make_file("g", PAGES, "N")
        yield made


def mapper_of_both(scene: Scene, second: DaxMount) -> Actor:
    """Start a process that maps a file of each mount, as mappings 0 and 1."""
    actor = scene.actor("p0", wrapper=[*DAXEMU, "run", "--"])
    for mapping, path in enumerate((scene.mount.path / "f", second.path / "g")):
        ask(actor, f"open {mapping} {path} rw")
        ask(actor, f"mmap {mapping} {mapping} 0 {PAGES} shared")
    return actor


def poison_at_once(mount: DaxMount, name: str, page: int) -> None:
    """Poison a page by a request, without the start of a command."""
    with mount.client() as client:
        client.request("inject", ino=(mount.path / name).stat().st_ino, ranges=[[page * PAGE, PAGE]])


def test_a_child_is_signalled_right_after_the_fork(early: Scene) -> None:
    p0 = early.mapper("p0", touch=range(ROUNDS))
    for page in range(ROUNDS):
        child = p0.fork(f"child{page}")
        assert child.cmd(f"tr 0 {page}").ok == letter(page)
        poison_at_once(early.mount, "f", page)
        assert signals_of(child) == [ao(page)]
        assert signals_of(p0) == [ao(page)]
        child.kill()


def test_a_child_that_touched_nothing_is_no_victim(early: Scene) -> None:
    """fork(2) copies no page tables of shared mappings: vma_needs_copy()."""
    p0 = early.mapper("p0", touch=range(ROUNDS))
    child = p0.fork("child")
    assert not any(present(child, 0, page) for page in range(ROUNDS))
    early.poison(0)
    assert signals_of(p0) == [ao(0)]
    assert signals_of(child) == []


@pytest.mark.parametrize("poisoned", ["first", "second"])
def test_mappings_of_two_mounts_in_a_child(early: Scene, second: DaxMount, poisoned: str) -> None:
    second.run("set", second.path, "early_kill=1")
    mount, name, mapping = (early.mount, "f", 0) if poisoned == "first" else (second, "g", 1)
    p0 = mapper_of_both(early, second)
    for page in range(4):
        assert p0.cmd(f"tr {mapping} {page}").ok is not None
        child = p0.fork(f"child{page}")
        grandchild = child.fork(f"grandchild{page}")
        victims = (p0, child, grandchild)
        for victim in (child, grandchild):
            assert victim.cmd(f"tr {mapping} {page}").ok == p0.cmd(f"tr {mapping} {page}").ok
        poison_at_once(mount, name, page)
        for victim in victims:
            assert signals_of(victim) == [ao(page, mapping=mapping)]
            consumes(victim, f"tr {mapping} {page}", ar(page, mapping=mapping))
        grandchild.kill()
        child.kill()
    for each in (early.mount, second):
        assert not each.events("UnexpectedError")


def test_a_store_of_a_child_to_a_shared_block_is_a_copy(scene: Scene, second: DaxMount) -> None:
    for mount, name in ((scene.mount, "f"), (second, "g")):
        mount.run("reflink", mount.path / name, mount.path / "copy")
    p0 = mapper_of_both(scene, second)
    child = p0.fork("child")
    for mapping, (mount, name) in enumerate(((scene.mount, "f"), (second, "g"))):
        before = (mount.path / "copy").read_bytes()
        assert child.cmd(f"tw {mapping} 1 x").ok is not None
        assert p0.cmd(f"tr {mapping} 1").ok == "x"
        assert (mount.path / name).read_bytes()[PAGE : PAGE + 1] == b"x"
        assert (mount.path / "copy").read_bytes() == before
