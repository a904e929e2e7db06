"""AO through reflinks: every owner of the block is signalled at its own offset, and no other file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.scene import PAGE, Scene, ao, ask, letter, signals_of

pytestmark = pytest.mark.mount

BAD = 1
"""Page to poison."""


def reflink(scene: Scene, source: str, clone: str, *options: str) -> Path:
    path = scene.mount.path
    scene.mount.run("reflink", path / source, path / clone, *options)
    return path / clone


def test_every_owner_is_signalled_at_its_own_offset(early: Scene) -> None:
    """Page i + 2 of the clone is page i of the file; p2 maps both (`d0-reflink-late`,
    `d3-reflink-one-each-late`).
    """
    reflink(early, "f", "clone", "--dest-offset", "8K")
    p0 = early.mapper("p0", touch=[BAD])
    p1 = early.actor("p1")
    for command in ("open 0 clone rw", "mmap 0 0 0 8 shared"):
        ask(p1, command)
    assert p1.cmd(f"tr 0 {BAD + 2}").ok == letter(BAD)
    p2 = early.mapper("p2", touch=[BAD])
    for command in ("open 1 clone rw", "mmap 1 1 0 8 shared"):
        ask(p2, command)
    assert p2.cmd(f"tr 1 {BAD + 2}").ok == letter(BAD)
    (outcome,) = early.poison(BAD)
    assert outcome["told"] == 4
    assert signals_of(p0) == [ao(BAD)]
    assert signals_of(p1) == [ao(BAD + 2)]
    assert sorted(signals_of(p2), key=lambda s: str(s["addr"])) == [ao(BAD), ao(BAD + 2, mapping=1)]
    assert sorted(early.damaged()) == [("/clone", (BAD + 2) * PAGE, PAGE), ("/f", BAD * PAGE, PAGE)]


def test_poison_found_through_a_clone(early: Scene) -> None:
    clones = [f"clone{i}" for i in range(5)]
    for clone in clones:
        reflink(early, "f", clone)
    p0 = early.mapper("p0", touch=[BAD])
    others = [early.mapper(f"p{i}", clone, touch=[BAD]) for i, clone in enumerate(clones, start=1)]
    (outcome,) = early.poison(BAD, file="clone3")
    assert outcome["told"] == 6
    for actor in (p0, *others):
        assert signals_of(actor) == [ao(BAD)]


def test_a_file_with_a_block_of_its_own_again(early: Scene) -> None:
    """A page overwritten after the clone has a new block; the old block belongs to the clone alone
    (`d1-reflink-cowed`).
    """
    reflink(early, "f", "clone")
    p0, p1 = early.mapper("p0"), early.mapper("p1", "clone", touch=[BAD])
    ask(p0, f"pwrite 0 {BAD * PAGE} {PAGE} c")
    assert p0.cmd(f"tr 0 {BAD}").ok == "c"
    early.poison(BAD)
    assert signals_of(p0) == [ao(BAD)]
    assert signals_of(p1) == []
    assert p1.cmd(f"tr 0 {BAD}").ok == letter(BAD)
    ask(p0, f"pwrite 0 {BAD * PAGE} {PAGE} d")
    assert p0.cmd(f"tr 0 {BAD}").ok == "d"
    early.poison(BAD, file="clone")
    assert signals_of(p0) == []
    assert signals_of(p1) == [ao(BAD)]
    assert p0.cmd(f"tr 0 {BAD}").ok == "d"
