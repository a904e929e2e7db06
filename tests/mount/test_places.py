"""``daxemu inject --page``, ``--find`` and ``--every``: ranges named by page, by bytes and by a glob."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from tests.support.mount import DaxMount

pytestmark = pytest.mark.mount
PAGE = 4096
CHUNK = 1 << 20
"""Bytes of one read of the search."""


def damaged(mount: DaxMount) -> list[tuple[str, int, int]]:
    files = mount.json("damaged", mount.path)["files"]
    return sorted((found["path"], found["offset"], found["length"]) for found in files)


def test_pages_and_offsets_together(dax_mount: DaxMount) -> None:
    file = dax_mount.make_file("f", 8)
    dax_mount.run("inject", file, "--page", 2, "--page", 5, "--offset", 7 * PAGE)
    assert damaged(dax_mount) == [("/f", page * PAGE, PAGE) for page in (2, 5, 7)]
    dax_mount.run("clear", file, "--page", 5)
    assert damaged(dax_mount) == [("/f", page * PAGE, PAGE) for page in (2, 7)]


@pytest.mark.parametrize("page", [8, 1 << 52, 1 << 70])
def test_a_page_past_the_end_is_refused(dax_mount: DaxMount, page: int) -> None:
    file = dax_mount.make_file("f", 8)
    assert dax_mount.run("inject", file, "--page", page, status=2).count("\n") == 1
    assert damaged(dax_mount) == []


@pytest.mark.parametrize("at", [0, 5000, CHUNK - 3, 2 * CHUNK - 1, 3 * CHUNK - 7])
def test_find_poisons_the_sectors_of_the_bytes(dax_mount: DaxMount, at: int) -> None:
    file = dax_mount.path / "f"
    content = bytearray(b"-" * (3 * CHUNK))
    content[at : at + 7] = b"key:\x00\xff!"
    file.write_bytes(content)
    dax_mount.run("inject", file, "--find", r"key:\x00\xFf!")
    first, last = at // 512 * 512, (at + 6) // 512 * 512
    assert damaged(dax_mount) == [("/f", first, last + 512 - first)]


def test_find_is_past_holes_and_poison(dax_mount: DaxMount) -> None:
    """The first occurrence lies in poison; bytes before and after a hole are not one text."""
    file = dax_mount.path / "f"
    with open(file, "wb") as out:
        out.write(b"needle".ljust(2 * PAGE, b"-")[: PAGE - 3] + b"nee")
        out.seek(5 * PAGE)
        out.write(b"dle".ljust(PAGE + 100, b"-") + b"needle")
    dax_mount.run("inject", file, "--page", 0)
    dax_mount.run("inject", file, "--find", "needle")
    assert damaged(dax_mount)[1:] == [("/f", 6 * PAGE, 512)]


def test_find_sees_a_store_that_is_not_written_back(dax_mount: DaxMount) -> None:
    file = dax_mount.path / "f"
    with open(file, "w+b") as out:
        out.truncate(4 * PAGE)
        with mmap.mmap(out.fileno(), 0) as mapped:
            mapped[2 * PAGE : 2 * PAGE + 6] = b"needle"
            dax_mount.run("inject", file, "--find", "needle")
            assert damaged(dax_mount) == [("/f", 2 * PAGE, 512)]


def test_find_makes_no_page_present_elsewhere(dax_mount: DaxMount) -> None:
    """A search through the page cache would: a fault maps cached neighbours, too."""
    file = dax_mount.make_file("f", 16)
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        dax_mount.run("inject", file, "--find", "PPPP", "--latent")
        with mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            mapped.madvise(mmap.MADV_RANDOM)  # no read-ahead
            assert mapped[0] == ord("A")
            mapping = Path("/proc/self/smaps").read_text().partition(f" {file}\n")[2]
            assert mapping.partition("Rss:")[2].split()[:2] == ["4", "kB"]


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (("--find", "needle"), "does not hold the bytes 'needle'"),
        (("--find", ""), "--find has no bytes"),
        (("--find", "AAAA", "--length", "4K"), "--length belongs to --offset"),
        (("--find", "AAAA", "--find", "needle"), "does not hold the bytes 'needle'"),
        (("--every", "f"), "give the mountpoint as PATH"),
    ],
)
def test_refusals_of_a_file(dax_mount: DaxMount, options: tuple[str, ...], refusal: str) -> None:
    file = dax_mount.make_file("f", 2)
    assert refusal in dax_mount.run("inject", file, *options, status=2)
    assert damaged(dax_mount) == []


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (("--find", "A"), "give a file as PATH"),
        (("--every", "*.log"), "no file on"),
        (("--every", "f", "--page", "2"), "1 files match f, but none has data"),
        (("--every", "f", "--find", "needle"), "1 files match f, but none has data"),
        (("--every", "f", "--on", "read:f"), "--every is for now"),
    ],
)
def test_refusals_of_the_mountpoint(dax_mount: DaxMount, options: tuple[str, ...], refusal: str) -> None:
    dax_mount.make_file("f", 2)
    assert refusal in dax_mount.run("inject", dax_mount.path, *options, status=2)
    assert damaged(dax_mount) == []


def test_every_file_that_matches(dax_mount: DaxMount) -> None:
    """Holes, short files, other names, links and directories are left out; the first two are counted."""
    (dax_mount.path / "d.sst").mkdir()
    long, short = dax_mount.make_file("long.sst", 8), dax_mount.make_file("d.sst/short.sst", 2)
    dax_mount.make_file("other.log", 8)
    dax_mount.make_file("too-short.sst", 1)
    with open(dax_mount.path / "hole.sst", "wb") as hole:
        hole.truncate(8 * PAGE)
    os.link(long, dax_mount.path / "again.sst")
    (dax_mount.path / "link.sst").symlink_to("other.log")
    result = dax_mount.json("inject", dax_mount.path, "--every", "*.sst", "--page", 1, "--length", "8K")
    assert damaged(dax_mount) == [
        ("/again.sst", PAGE, 2 * PAGE),
        ("/d.sst/short.sst", PAGE, PAGE),
    ]
    assert [file["path"] for file in result["files"]] == ["/again.sst", "/d.sst/short.sst"]
    assert result["skipped"] == ["/hole.sst", "/too-short.sst"]
    assert [part["length"] for part in result["ranges"]] == [2 * PAGE, PAGE]
    assert short.stat().st_size == 2 * PAGE


def test_every_prints_files_and_counts(dax_mount: DaxMount) -> None:
    for name in ("a.sst", "b.sst"):
        dax_mount.make_file(name, 2)
    (dax_mount.path / "c.sst").write_bytes(b"")
    with open(dax_mount.path / "b.sst", "r+b") as partly:
        partly.truncate(4 * PAGE)
    shown = dax_mount.run("inject", dax_mount.path, "--every", "/*.sst", "--length", "1G").splitlines()
    assert [line.partition(": poisoned")[0] for line in shown[:2]] == ["/a.sst", "/b.sst"]
    assert shown[2:] == [
        f"note: {2 * PAGE} bytes are holes of the file: a hole has no media to poison",
        "note: 1 files skipped: no data in the ranges",
    ]


def test_every_with_find(dax_mount: DaxMount) -> None:
    for name, text in (("a", b"--key--"), ("b", b"------"), ("c", b"key")):
        (dax_mount.path / name).write_bytes(b"." * PAGE + text)
    result = dax_mount.json("inject", dax_mount.path, "--every", "?", "--find", "key")
    assert damaged(dax_mount) == [("/a", PAGE, 512), ("/c", PAGE, 512)]
    assert result["skipped"] == ["/b"]


def test_every_sees_a_store_that_is_not_written_back(dax_mount: DaxMount) -> None:
    with open(dax_mount.path / "f", "w+b") as out:
        out.truncate(4 * PAGE)
        with mmap.mmap(out.fileno(), 0) as mapped:
            mapped[2 * PAGE] = 1
            dax_mount.run("inject", dax_mount.path, "--every", "f", "--page", 2)
    assert damaged(dax_mount) == [("/f", 2 * PAGE, PAGE)]


def test_find_with_a_rule(dax_mount: DaxMount) -> None:
    file = dax_mount.make_file("f", 4)
    dax_mount.run("inject", file, "--find", "CCCC", "--on", "open:f")
    assert damaged(dax_mount) == []
    os.close(os.open(file, os.O_RDONLY))
    assert damaged(dax_mount) == [("/f", 2 * PAGE, 512)]
