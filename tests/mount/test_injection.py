"""Ranges given to ``daxemu inject``: several, across extents, unaligned, over holes; lost stores."""

from __future__ import annotations

import pytest

from tests.support.scene import PAGE, Scene, ao, ar, ask, consumes, letter, present, refused, signals_of

pytestmark = pytest.mark.mount

BAD = 3
"""Page to poison."""
AT = BAD * PAGE


# -- ranges


def test_two_ranges_in_one_call(scene: Scene) -> None:
    scene.mount.inject("f", (AT, PAGE), (64 * PAGE, 2 * PAGE))
    assert scene.damaged() == [("/f", AT, PAGE), ("/f", 64 * PAGE, 2 * PAGE)]
    assert len(scene.mount.events("MemoryFailureHandled")) == 2


def test_nothing_happens_unless_all_ranges_are_good(scene: Scene) -> None:
    p0 = scene.mapper(touch=[BAD])
    before = len(scene.mount.events())
    path = scene.mount.path / "f"
    ranges = ("--offset", AT, "--length", PAGE, "--offset", "1G", "--length", PAGE)
    assert "past the end" in scene.mount.run("inject", path, *ranges, status=2)
    assert scene.badblocks() == []
    assert len(scene.mount.events()) == before
    assert p0.cmd(f"tr 0 {BAD}").ok == letter(BAD)


def test_across_two_extents(early: Scene) -> None:
    """The file's pages 0 to 7 are f's, page 8 is f's page 64."""
    f, joined = early.mount.path / "f", early.mount.path / "joined"
    early.mount.run("reflink", f, joined, "--length", 8 * PAGE)
    early.mount.run("reflink", f, joined, "--offset", 64 * PAGE, "--length", PAGE, "--dest-offset", 8 * PAGE)
    p0 = early.mapper("p0", touch=[7, 64])
    p1 = early.mapper("p1", "joined", pages=9, touch=[7])
    assert p1.cmd("tr 0 8").ok == letter(64)
    result = early.mount.inject("joined", (7 * PAGE, 2 * PAGE))
    assert [r["nr_pages"] for r in result["ranges"]] == [1, 1]
    assert early.damaged() == [
        ("/f", 7 * PAGE, PAGE),
        ("/f", 64 * PAGE, PAGE),
        ("/joined", 7 * PAGE, PAGE),
        ("/joined", 8 * PAGE, PAGE),
    ]
    assert sorted(signals_of(p0), key=str) == sorted([ao(7), ao(64)], key=str)
    assert sorted(signals_of(p1), key=str) == sorted([ao(7), ao(8)], key=str)


@pytest.mark.parametrize(
    ("offset", "length", "sectors", "pages"),
    [
        pytest.param(AT + 100, 10, [(AT, 512)], 1, id="inside-a-sector"),
        pytest.param(AT + 500, 100, [(AT, 1024)], 1, id="two-sectors"),
        pytest.param(AT - 10, 20, [(AT - 512, 1024)], 2, id="two-pages"),
        pytest.param(AT, 1, [(AT, 512)], 1, id="a-byte"),
    ],
)
def test_unaligned(
    scene: Scene, offset: int, length: int, sectors: list[tuple[int, int]], pages: int
) -> None:
    first = scene.device_offset("f", 0)
    text = scene.mount.run("inject", scene.mount.path / "f", "--offset", offset, "--length", length)
    assert "rounded out" in text
    assert scene.badblocks() == [[(first + start) // 512, count // 512] for start, count in sectors]
    (event,) = scene.mount.events("MemoryFailureHandled")
    assert event["nr_pages"] == pages


def test_aligned_is_not_said_to_be_rounded(scene: Scene) -> None:
    assert scene.mount.inject("f", (AT, 512))["rounded"] is False


def test_device_range(early: Scene) -> None:
    """With the mountpoint for PATH, offsets are device offsets."""
    p0 = early.mapper(touch=[BAD])
    offset = early.device_offset("f", BAD)
    result = early.mount.inject("", (offset, PAGE))
    assert [(r["offset"], r["told"]) for r in result["ranges"]] == [(offset, 1)]
    assert signals_of(p0) == [ao(BAD)]


# -- holes


def test_a_hole_cannot_be_poisoned(scene: Scene) -> None:
    p0 = scene.actor()
    ask(p0, "open 0 sparse creat")
    ask(p0, f"trunc 0 {16 * PAGE}")
    before = scene.mount.events()
    error = scene.mount.run("inject", scene.mount.path / "sparse", "--offset", AT, status=2)
    assert "hole" in error
    assert scene.badblocks() == []
    assert scene.mount.events() == before
    ask(p0, f"pwrite 0 {AT} {PAGE} x")
    result = scene.mount.inject("sparse", (0, 8 * PAGE))
    assert [(r["nr_pages"], r["length"]) for r in result["ranges"]] == [(1, PAGE)]
    assert result["holes"] == 7 * PAGE
    assert scene.damaged() == [("/sparse", AT, PAGE)]


def test_store_into_a_hole_that_is_not_written_back_yet(early: Scene) -> None:
    """A page in a hole has no block before the page is written back: injection writes the page back first."""
    p0 = early.actor()
    ask(p0, "open 0 sparse creat")
    ask(p0, f"trunc 0 {16 * PAGE}")
    ask(p0, "mmap 0 0 0 16 shared")
    assert p0.cmd(f"tw 0 {BAD} x").ok == "x"
    (result,) = early.mount.inject("sparse", (AT, PAGE))["ranges"]
    assert result["told"] == 1
    assert signals_of(p0) == [ao(BAD)]
    consumes(p0, f"tr 0 {BAD}", ar(BAD))
    assert early.mount.events("StoreLost") == []


# -- stores that are lost with their page


def test_lost_store_is_silent_on_dax(scene: Scene) -> None:
    """A dirty page lost to poison raises no error of fsync(2) on DAX (`g5-fsync-dirty`)."""
    p0 = scene.mapper(touch=[BAD])
    ask(p0, "open 1 f rw")
    assert p0.cmd(f"tw 0 {BAD} w").ok == "w"
    scene.poison(BAD)
    p1 = scene.actor("p1")
    ask(p1, "open 0 f rw")
    for actor, fd in ((p0, 0), (p0, 1), (p1, 0), (p0, 0)):
        assert ask(actor, f"fsync {fd}") == 0
    assert ask(p0, f"msync 0 {BAD} 1") == 0
    assert ask(p0, "msync 0 0 8") == 0
    (event,) = scene.mount.events("StoreLost")
    assert (event["path"], event["offset"], event["length"]) == ("/f", AT, PAGE)
    assert refused(p0, f"pread 0 {AT} {PAGE}") == "EIO"
    consumes(p0, f"tr 0 {BAD}", ar(BAD))


def test_lost_store_as_an_error_of_fsync(scene: Scene) -> None:
    """lost_store=eio: fsync(2) fails once for each descriptor that was open, as in the page cache."""
    scene.set(lost_store="eio")
    p0, p1 = scene.mapper("p0", touch=[BAD]), scene.mapper("p1", touch=[BAD])
    ask(p0, "open 1 f rw")
    assert p0.cmd(f"tw 0 {BAD} w").ok == "w"
    scene.poison(BAD)
    for actor, fd in ((p0, 0), (p0, 1), (p1, 0)):
        assert refused(actor, f"fsync {fd}") == "EIO"
        assert ask(actor, f"fsync {fd}") == 0
    ask(p0, "open 2 f rw")
    assert ask(p0, "fsync 2") == 0
    (event,) = scene.mount.events("StoreLost")
    assert (event["path"], event["offset"], event["length"]) == ("/f", AT, PAGE)
    assert refused(p0, f"pread 0 {AT} {PAGE}") == "EIO"
    consumes(p1, f"tr 0 {BAD}", ar(BAD))


def test_lost_store_as_an_error_of_msync(scene: Scene) -> None:
    scene.set(lost_store="eio")
    p0 = scene.mapper(touch=[BAD])
    assert p0.cmd(f"tw 0 {BAD} w").ok == "w"
    scene.poison(BAD)
    assert refused(p0, "msync 0 0 8") == "EIO"
    assert ask(p0, "msync 0 0 8") == 0


@pytest.mark.parametrize("lost_store", ["silent", "eio"])
def test_nothing_is_lost_of_a_clean_page(scene: Scene, lost_store: str) -> None:
    scene.set(lost_store=lost_store)
    p0 = scene.mapper(touch=[BAD, 40])
    assert p0.cmd(f"tw 0 {BAD} w").ok == "w"
    assert p0.cmd("tw 0 40 v").ok == "v"
    assert ask(p0, f"msync 0 {BAD} 1") == 0
    scene.poison(BAD)
    assert ask(p0, "fsync 0") == 0
    assert scene.mount.events("StoreLost") == []
    assert present(p0, 0, 40)
    assert p0.cmd("tr 0 40").ok == "v"


# -- clones of poison


def test_reflink_of_a_poisoned_file_shares_the_poison(scene: Scene) -> None:
    """A reflink of a poisoned file shares the poisoned block (`g11-ficlone-clean`, `m7-mce-reflink`)."""
    scene.poison(BAD)
    path = scene.mount.path
    scene.mount.run("reflink", path / "f", path / "clone")
    assert scene.damaged() == [("/clone", AT, PAGE), ("/f", AT, PAGE)]
    p0 = scene.mapper(file="clone")
    assert refused(p0, f"pread 0 {AT} {PAGE}") == "EIO"
    assert refused(p0, f"pwrite 0 {AT + 12} 100 n") == "EIO"
    consumes(p0, f"tr 0 {BAD}", ar(BAD))
    (path / "f").unlink()
    assert scene.damaged() == [("/clone", AT, PAGE)]
