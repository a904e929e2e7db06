"""Poison in the metadata of a device, page by page, before or during a mount: never garbage, never a hang."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest

from daxemu.errors import CorruptMetadata, DaxemuError
from tests.support.metadata import Page, metadata_pages, poison, restore, superblocks
from tests.support.mount import daxemu
from tests.support.quick import QuickMount
from tests.support.scene import PAGE
from tests.support.syscalls import clone_range

pytestmark = pytest.mark.mount

TREES = 12


class Damaged:
    """Device with some files, and a pristine copy to restore the device from."""

    def __init__(self, mount: QuickMount, scratch: Path) -> None:
        self.mount = mount
        self.device = mount.device
        self.pristine = scratch / "pristine"
        self._fill()
        self.expected = self.look()
        mount.umount()
        restore(self.device, self.pristine)
        self.pages = metadata_pages(self.device)

    def _fill(self) -> None:
        top = self.mount.path
        for i in range(TREES):
            (top / f"d{i}").mkdir()
            for j in range(6):
                (top / f"d{i}" / f"file{j}").write_bytes(bytes([65 + i + j]) * (j * 3000 + 1))
            os.setxattr(top / f"d{i}" / "file1", b"user.x", b"y" * 500)
        with (top / "d0" / "file5").open("rb") as source, (top / "clone").open("wb") as target:
            clone_range(target.fileno(), source.fileno())

    def look(self) -> dict[str, bytes]:
        top = self.mount.path
        return {str(p.relative_to(top)): p.read_bytes() if p.is_file() else b"" for p in top.rglob("*")}

    def reset(self) -> None:
        """As at the beginning."""
        restore(self.pristine, self.device)

    def mounts(self) -> str | None:
        """Mount. Return None if the mount works, all files are unchanged, and writes succeed; otherwise the
        refusal.
        """
        try:
            self.mount.mount()
            assert self.look() == self.expected
            new = self.mount.path / "new"
            new.write_bytes(b"new" * 5000)
            new.unlink()
            self.mount.umount()
        except CorruptMetadata as error:
            self.mount.bury()
            return str(error)
        return None


def is_clear(refusal: str) -> bool:
    """Return True for one line that says how to go on."""
    return "\n" not in refusal and "daxemu fsck" in refusal


@pytest.fixture
def damaged(quick_mount: QuickMount, tmp_path: Path) -> Damaged:
    quick_mount.sound = False  # each test checks on its own
    return Damaged(quick_mount, tmp_path)


def _some(pages: list[Page]) -> list[Page]:
    """Return the pages at the beginning of each file, and every 16th of the rest."""
    return [page for page in pages if page.number < 6 or page.number % 16 == 0]


@pytest.mark.parametrize("replica", [0, 1])
@pytest.mark.parametrize("quick_mount", [32 << 20], indirect=True)
def test_one_copy_of_a_page(damaged: Damaged, replica: int) -> None:
    """The other copy serves; fsck finds the poisoned copy, and rewrites it."""
    for page in damaged.pages:
        poison(damaged.device, page.offsets[replica])
        line = f"metadata page {page.number} of {page.file.name.lower()} is poisoned: one copy is lost"
        assert damaged.mount.fsck().wrong == [line]
        if page in _some(damaged.pages):
            assert damaged.mounts() is None
        assert damaged.mount.fsck(repair=True).wrong == []
    assert damaged.mounts() is None


@pytest.mark.parametrize("quick_mount", [32 << 20], indirect=True)
def test_both_copies_of_a_page(damaged: Damaged) -> None:
    """The mount is refused in one line, unless the page is unused; then all files are present."""
    refused = 0
    for page in damaged.pages:
        damaged.reset()
        poison(damaged.device, *page.offsets)
        assert damaged.mount.fsck().wrong
        if page not in _some(damaged.pages):
            continue
        refusal = damaged.mounts()
        if refusal is not None:
            refused += 1
            assert is_clear(refusal)
            assert damaged.mount.fsck(repair=True).wrong
            assert damaged.mounts() is not None
    assert refused >= 3


@pytest.mark.parametrize("quick_mount", [32 << 20], indirect=True)
@pytest.mark.parametrize("replica", [0, 1])
def test_every_copy_of_one_kind(damaged: Damaged, replica: int) -> None:
    """Poison hits half of all metadata, and a superblock."""
    offsets = [page.offsets[replica] for page in damaged.pages]
    poison(damaged.device, *offsets, superblocks(damaged.device)[replica])
    assert len(damaged.mount.fsck().wrong) == len(offsets) + 1
    assert damaged.mounts() is None
    assert damaged.mount.fsck(repair=True).healed > 0
    assert damaged.mount.fsck().wrong == []
    assert damaged.mounts() is None


@pytest.mark.parametrize("quick_mount", [32 << 20], indirect=True)
def test_superblocks(damaged: Damaged) -> None:
    places = superblocks(damaged.device)
    for name, place in zip(("first", "second"), places, strict=True):
        for within in (0, 15 * PAGE):
            damaged.reset()
            poison(damaged.device, place + within, length=512)
            assert damaged.mount.fsck().wrong == [f"the {name} superblock is poisoned"]
            assert damaged.mounts() is None
            assert damaged.mount.fsck(repair=True).healed == 1
            assert damaged.mount.fsck().wrong == []
            assert damaged.mounts() is None
    damaged.reset()
    poison(damaged.device, *places)
    refusal = damaged.mounts()
    assert refusal is not None
    assert "neither superblock can be read" in refusal
    assert "\n" not in refusal
    both = [f"the {name} superblock is poisoned" for name in ("first", "second")]
    for repair in (False, True):
        report = damaged.mount.fsck(repair=repair)
        assert (report.wrong, report.mendable, report.healed) == (both, 0, 0)


@pytest.mark.parametrize("quick_mount", [32 << 20], indirect=True)
def test_the_command_line_of_fsck(damaged: Damaged) -> None:
    """The exit status is 9 for an inconsistent device; after --repair 0."""
    page = damaged.pages[0]
    poison(damaged.device, page.offsets[1])
    said = daxemu("fsck", damaged.device, status=9)
    assert said == f"daxemu: {damaged.device}: 1 problems; try fsck --repair\n"
    assert "rewrote 1 metadata pages" in daxemu("fsck", "--repair", damaged.device)
    assert "0 problems" in daxemu("fsck", damaged.device)
    poison(damaged.device, *page.offsets)
    by_hand = "save what can be read, then mkfs --force"
    said = daxemu("fsck", damaged.device, status=9)
    assert said == f"daxemu: {damaged.device}: 1 problems, which fsck --repair cannot fix: {by_hand}\n"
    said = daxemu("fsck", "--repair", damaged.device, status=9)
    assert said == f"daxemu: {damaged.device}: 1 problems are left: {by_hand}\n"
    said = daxemu("mount", damaged.device, damaged.mount.path, status=9)
    assert said.count("\n") == 1
    assert "daxemu fsck" in said


# -- while mounted


@pytest.mark.parametrize("quick_mount", [32 << 20], indirect=True)
@pytest.mark.parametrize("where", ["db", "wal", "superblock"])
def test_during_a_mount(damaged: Damaged, where: str) -> None:
    """The filesystem shuts down; synced data is present after a repair."""
    mount = damaged.mount
    offset = superblocks(damaged.device)[0]
    if where != "superblock":
        offset = next(page.offsets[0] for page in damaged.pages if page.file.name == where.upper())
    mount.mount()
    (mount.path / "synced").write_bytes(b"s" * 10000)
    fd = os.open(mount.path / "synced", os.O_RDWR)
    try:
        os.fsync(fd)
        mount.run("inject", mount.path, "--offset", offset, "--length", PAGE)
        for action in (
            lambda: os.listdir(mount.path / "d1"),
            lambda: (mount.path / "d2" / "file1").read_bytes(),
            lambda: (mount.path / "new").touch(),
            lambda: os.fsync(fd),
            lambda: os.pwrite(fd, b"x", 0),
        ):
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                action()
    finally:
        os.close(fd)
    (event,) = mount.events("FilesystemShutdown")
    assert "Corruption of on-disk metadata" in event["reason"]
    assert mount.json("status", mount.path)["state"] == "shut down"
    assert "Shutting down filesystem" in mount.run("log", mount.path, "--dmesg")
    mount.umount()
    assert mount.fsck(repair=True).wrong == []
    damaged.expected["synced"] = b"s" * 10000
    assert damaged.mounts() is None


@pytest.mark.parametrize("quick_mount", [32 << 20], indirect=True)
def test_latent_poison_in_the_metadata(damaged: Damaged) -> None:
    """Latent poison is found by a read or a write: in one copy it does no harm, in both copies a commit shuts
    the filesystem down.
    """
    mount = damaged.mount
    one, two = damaged.pages[0].offsets
    mount.mount()
    mount.run("inject", mount.path, "--offset", one, "--length", PAGE, "--latent")
    (mount.path / "synced").write_bytes(b"s")
    fd = os.open(mount.path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    mount.run("inject", mount.path, "--offset", two, "--length", PAGE, "--latent")
    damaged.expected["synced"] = b"s"
    with suppress(DaxemuError):
        mount.umount()
    mount.bury()
    refusal = damaged.mounts()
    assert refusal is None or is_clear(refusal)
