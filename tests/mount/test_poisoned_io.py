"""System calls on poisoned files: their results, and the media afterwards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.actor import Actor
from tests.support.scene import (
    PAGE,
    PAGES,
    Scene,
    append_until_full,
    ar,
    ask,
    consumes,
    letter,
    refused,
    signals_of,
)

pytestmark = pytest.mark.mount

BAD = 3
"""Page to poison."""
AT = BAD * PAGE


def reads(actor: Actor, fd: int, offset: int, length: int, expected: str) -> None:
    """Check that the whole range can be read, with these bytes."""
    result = actor.cmd(f"pread {fd} {offset} {length}")
    assert (result.ret, result.pages) == (length, expected), result


def reads_up_to_poison(actor: Actor, fd: int, offset: int, length: int, bad: int = BAD) -> None:
    """Check for EIO, or for the good bytes before the poison and EIO there."""
    result = actor.cmd(f"pread {fd} {offset} {length}")
    if result.ret == -1:
        assert result.errno == "EIO"
        return
    assert result.ret is not None
    assert 0 < result.ret <= bad * PAGE - offset, result
    if offset % PAGE == 0:
        assert result.pages == "".join(letter(page) for page in range(offset // PAGE, bad))
    assert refused(actor, f"pread {fd} {bad * PAGE} {length}") == "EIO"


# -- reading


def test_read(scene: Scene) -> None:
    """A read fails at the poison and across the poison, and succeeds around it (`g0-read-clean`,
    `m0-mce-ao`).
    """
    p0 = scene.mapper(touch=[BAD])
    scene.poison(BAD)
    for offset, length in ((AT, PAGE), (AT, 1), (AT + 100, 5), (AT + PAGE - 1, 2)):
        assert refused(p0, f"pread 0 {offset} {length}") == "EIO"
    for offset, length in ((0, 32768), (8192, 12288), (AT - 1, 2)):
        reads_up_to_poison(p0, 0, offset, length)
    reads(p0, 0, 0, AT, "ABC")
    reads(p0, 0, AT + PAGE, PAGE, letter(BAD + 1))
    reads(p0, 0, AT + PAGE, 8 * PAGE, "EFGHIJKL")
    assert ask(p0, "fsync 0") == 0
    assert signals_of(p0) == []


def test_one_bad_sector_makes_its_page_unreadable(scene: Scene) -> None:
    """One bad sector makes the whole page unreadable (`m5-mce-cacheline`)."""
    p0 = scene.mapper(pages=8)
    scene.mount.inject("f", (AT + 1024, 64))
    for offset in (AT, AT + 1024, AT + 1536, AT + 3584):
        assert refused(p0, f"pread 0 {offset} 512") == "EIO"
    reads_up_to_poison(p0, 0, 0, AT + 1)
    reads(p0, 0, 0, AT, "ABC")


def test_read_direct(scene: Scene) -> None:
    p0 = scene.mapper()
    scene.poison(BAD)
    ask(p0, "open 3 f direct")
    assert refused(p0, f"pread 3 {AT} {PAGE}") == "EIO"
    reads_up_to_poison(p0, 3, 0, 32768)
    reads_up_to_poison(p0, 3, 8192, 12288)
    reads(p0, 3, 0, AT, "ABC")
    reads(p0, 3, 4 * PAGE, 4 * PAGE, "EFGH")


def test_read_into_several_buffers(scene: Scene) -> None:
    scene.poison(BAD)
    fd = os.open(scene.mount.path / "f", os.O_RDONLY)
    try:
        buffers = [bytearray(PAGE) for _ in range(3)]
        assert os.preadv(fd, buffers, 0) == 3 * PAGE
        assert [bytes(buffer) for buffer in buffers] == [letter(i).encode() * PAGE for i in range(3)]
        with pytest.raises(OSError, match="Input/output error"):
            os.preadv(fd, buffers, AT)
    finally:
        os.close(fd)


def test_poison_survives_a_remount(scene: Scene) -> None:
    scene.poison(BAD)
    scene.mount.umount()
    scene.mount.mount_again()
    p0 = scene.mapper()
    reads_up_to_poison(p0, 0, 0, 32768)
    assert refused(p0, f"pread 0 {AT} {PAGE}") == "EIO"
    consumes(p0, f"tr 0 {BAD}", ar(BAD))
    assert scene.damaged() == [("/f", AT, PAGE)]


# -- writing


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        pytest.param(AT + 50, 100, id="inside"),
        pytest.param(AT - PAGE, PAGE + 100, id="a-page-before-and-a-part"),
        pytest.param(AT + 100, 2 * PAGE - 100, id="a-part-and-a-page-after"),
        pytest.param(AT, PAGE - 1, id="all-but-a-byte"),
    ],
)
def test_partial_write(scene: Scene, offset: int, length: int) -> None:
    """A partial write to a poisoned page fails and changes no byte, by any way to read
    (`g2-write-partial-clean`, `m0-mce-ao`).
    """
    p0 = scene.mapper(touch=[BAD - 1, BAD + 1])
    scene.poison(BAD)
    assert refused(p0, f"pwrite 0 {offset} {length} n") == "EFAULT"
    assert refused(p0, f"pread 0 {AT} {PAGE}") == "EIO"
    ask(p0, "open 3 f direct")
    for page in (BAD - 1, BAD + 1):
        reads(p0, 0, page * PAGE, PAGE, letter(page))
        reads(p0, 3, page * PAGE, PAGE, letter(page))
        assert p0.cmd(f"tr 0 {page}").ok == letter(page)
    assert scene.damaged() == [("/f", AT, PAGE)]
    scene.mount.run("clear", scene.mount.path / "f", "--offset", AT)
    reads(p0, 0, AT, PAGE, "0")


@pytest.mark.parametrize(
    ("fd", "offset", "length"),
    [
        pytest.param(0, AT, PAGE, id="the-page"),
        pytest.param(0, 0, 8 * PAGE, id="many-pages"),
        pytest.param(0, AT - 100, PAGE + 200, id="parts-of-good-pages-too"),
        pytest.param(3, AT, PAGE, id="direct"),
        pytest.param(3, AT - PAGE, 3 * PAGE, id="direct-many"),
    ],
)
def test_write_that_covers_the_page(scene: Scene, fd: int, offset: int, length: int) -> None:
    """A write of the whole page clears poison and badblocks (`g1-write-full-clean`,
    `g4-write-direct-clean`).
    """
    p0 = scene.mapper(touch=[BAD])
    ask(p0, "open 3 f direct")
    scene.poison(BAD)
    assert ask(p0, f"pwrite {fd} {offset} {length} n") == length
    assert scene.badblocks() == []
    assert scene.damaged() == []
    (event,) = scene.mount.events("PoisonCleared")
    assert (event["offset"], event["length"], event["by"]) == (scene.device_offset("f", BAD), PAGE, "write")
    reads(p0, 0, AT, PAGE, "n")
    assert p0.cmd(f"tr 0 {BAD}").ok == "n"
    assert ask(p0, "fsync 0") == 0
    ask(p0, "open 4 f direct")
    reads(p0, 4, AT, PAGE, "n")
    assert signals_of(p0) == []


def test_write_over_several_poisoned_pages(scene: Scene) -> None:
    p0 = scene.mapper()
    scene.poison(2, 4, 5)
    assert ask(p0, f"pwrite 0 {PAGE} {4 * PAGE} n") == 4 * PAGE
    reads(p0, 0, 0, 5 * PAGE, "Annnn")
    assert scene.damaged() == [("/f", 5 * PAGE, PAGE)]
    assert refused(p0, f"pread 0 {5 * PAGE} {PAGE}") == "EIO"


def test_partial_write_to_a_shared_page(scene: Scene) -> None:
    """A partial write must read the shared block for its copy, and fails (`m7-mce-reflink`)."""
    scene.mount.run("reflink", scene.mount.path / "f", scene.mount.path / "g")
    p0 = scene.mapper(touch=[])
    scene.poison(BAD)
    assert refused(p0, f"pwrite 0 {AT + 12} 100 n") == "EIO"


def test_append_to_a_poisoned_last_page(scene: Scene) -> None:
    p0 = scene.actor()
    ask(p0, "open 0 short creat")
    ask(p0, f"pwrite 0 0 {PAGE + 100} a")
    scene.mount.inject("short", (PAGE, 100))
    assert refused(p0, f"pwrite 0 {PAGE + 100} 50 b") == "EFAULT"
    assert (scene.mount.path / "short").stat().st_size == PAGE + 100


# -- a buffer in the poisoned page


def test_buffer_in_the_poisoned_page(scene: Scene, tmp_path: Path) -> None:
    """A buffer in the poisoned page: EFAULT or a short count, and no signal, for any file
    (`q0-kernel-access-clean`, with the bad block).
    """
    scene.mount.make_file("other", 8)
    (tmp_path / "outside").write_bytes(b"o" * 8 * PAGE)
    p0 = scene.mapper(touch=[BAD])
    ask(p0, "open 5 other rw")
    ask(p0, f"open 6 {tmp_path / 'outside'} rw")
    scene.poison(BAD)
    for fd in (5, 6):
        for verb in ("kwrite", "kread"):
            assert refused(p0, f"{verb} 0 {BAD} {fd} 0 {PAGE}") == "EFAULT"
            result = p0.cmd(f"{verb} 0 {BAD - 1} {fd} {4 * PAGE} {3 * PAGE}")
            assert result.ret == PAGE or result.errno == "EFAULT", f"{verb} {fd}: {result}"
    assert refused(p0, f"kwrite 0 {BAD} 0 0 {PAGE}") == "EFAULT"
    reads(p0, 5, 0, PAGE, "A")
    reads(p0, 0, 0, PAGE, "A")
    assert signals_of(p0) == []
    assert scene.signal_events(p0) == []


def test_buffer_of_another_process(scene: Scene) -> None:
    """process_vm_readv(2) and process_vm_writev(2) over poison of another process."""
    p0, p1 = scene.mapper("p0", touch=[BAD]), scene.actor("p1")
    scene.poison(BAD)
    for verb in ("pvmread", "pvmwrite"):
        assert p1.pvm(verb, p0, 0, BAD, PAGE).errno == "EFAULT"
    assert signals_of(p0) == []
    assert signals_of(p1) == []


# -- removing the file, or its end


def test_truncate_and_regrow(scene: Scene) -> None:
    """After truncation and growth the page has another block (`g8-truncate-clean`)."""
    p0 = scene.mapper(touch=[BAD])
    scene.poison(BAD)
    bad = scene.badblocks()
    assert ask(p0, "trunc 0 0") == 0
    assert ask(p0, f"trunc 0 {8 * PAGE}") == 0
    reads(p0, 0, 0, 8 * PAGE, "00000000")
    assert p0.cmd(f"tr 0 {BAD}").ok == "0"
    assert p0.cmd(f"tw 0 {BAD} t").ok == "t"
    assert ask(p0, "fsync 0") == 0
    reads(p0, 0, 0, 8 * PAGE, "000?0000")
    assert scene.device_offset("f", BAD) // 512 != bad[0][0]
    assert scene.badblocks() == bad
    assert scene.damaged() == []


@pytest.mark.parametrize("verb", ["punch", "zero"])
def test_punch_hole_and_zero_range(scene: Scene, verb: str) -> None:
    """The page is usable and zero again, with another block or a cleared one (`g9-punch-clean`,
    `g10-zero-range-clean`, `m1-mce-ao-nobody`).
    """
    p0, p1 = scene.mapper("p0", touch=[BAD]), scene.mapper("p1", touch=[BAD])
    scene.poison(BAD)
    consumes(p0, f"tr 0 {BAD}", ar(BAD))
    assert ask(p0, f"{verb} 0 {AT} {PAGE}") == 0
    reads(p0, 0, AT - PAGE, 3 * PAGE, f"{letter(BAD - 1)}0{letter(BAD + 1)}")
    assert p0.cmd(f"tr 0 {BAD}").ok == "0"
    assert p1.cmd(f"tw 0 {BAD} n").ok == "n"
    assert p0.cmd(f"tr 0 {BAD}").ok == "n"
    assert ask(p0, f"pwrite 0 {AT} {PAGE} m") == PAGE
    assert p1.cmd(f"tr 0 {BAD}").ok == "m"
    assert scene.damaged() == []
    assert signals_of(p0) == []


def test_truncate_inside_the_page(scene: Scene) -> None:
    """Truncation fails: the rest of the page's block cannot be zeroed."""
    p0 = scene.mapper()
    scene.poison(BAD)
    assert refused(p0, f"trunc 0 {AT + 100}") == "EIO"
    assert (scene.mount.path / "f").stat().st_size == PAGES * PAGE
    assert ask(p0, f"trunc 0 {AT}") == 0
    assert scene.damaged() == []


@pytest.mark.parametrize("dax_mount", ["16M"], indirect=True)
def test_a_bad_block_is_never_given_out_again(scene: Scene) -> None:
    path = scene.mount.path
    scene.poison(BAD, BAD + 1, 100)
    bad = scene.badblocks()
    (path / "f").unlink()
    append_until_full(path / "new", b"n")
    assert os.statvfs(path).f_bavail == 0
    assert scene.badblocks() == bad
    assert scene.damaged() == []
    assert (path / "new").read_bytes().strip(b"n") == b""
