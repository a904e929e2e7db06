"""Devices with corrupt media: a mount is refused in one clear line, and no process hangs."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from daxemu.errors import DaxemuError
from daxemu.host.proc.mountinfo import mount_at
from tests.support.metadata import metadata_pages, overwrite, restore, superblocks
from tests.support.mount import PATIENCE, daxemu
from tests.support.quick import QuickMount
from tests.support.scene import PAGE
from tests.support.zygote import wait_for_death

pytestmark = [pytest.mark.mount, pytest.mark.parametrize("quick_mount", [16 << 20], indirect=True)]


@pytest.fixture
def device(quick_mount: QuickMount) -> Path:
    """Device of an ended mount, with some files."""
    for i in range(20):
        quick_mount.make_file(f"f{i}", 3)
    quick_mount.umount()
    quick_mount.sound = False
    return quick_mount.device


def refusal(mount: QuickMount) -> str:
    """Return the error of ``daxemu mount``."""
    said = daxemu("mount", mount.device, mount.path, status=9)
    assert said.startswith("daxemu: ")
    assert said.count("\n") == 1
    assert mount_at(mount.path) is None
    return said


@pytest.mark.parametrize("what", ["garbage", "zeros", "ones"])
@pytest.mark.parametrize("which", [0, 1])
def test_one_superblock_overwritten(quick_mount: QuickMount, device: Path, what: str, which: int) -> None:
    junk = {"garbage": random.Random(1).randbytes(PAGE), "zeros": bytes(PAGE), "ones": b"\xff" * PAGE}[what]
    overwrite(device, superblocks(device)[which], junk)
    assert quick_mount.fsck().wrong, "fsck does not see that a copy is bad"
    quick_mount.mount()
    assert len(os.listdir(quick_mount.path)) == 20
    quick_mount.umount()
    assert quick_mount.fsck(repair=True).wrong == []


def _set_altmap(device: Path, altmap: int) -> None:
    config = device / "device.toml"
    lines = [f"altmap = {altmap}" if "altmap =" in line else line for line in config.read_text().splitlines()]
    config.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("altmap", [4 << 10, 64 << 10, 1 << 20, 4 << 20, 6 << 20, 8 << 20])
def test_a_changed_altmap_makes_no_new_filesystem(quick_mount: QuickMount, device: Path, altmap: int) -> None:
    """Both superblocks may then be read from zeros. The files are all there once the altmap is right."""
    _set_altmap(device, altmap)
    assert refusal(quick_mount)
    assert quick_mount.fsck().wrong
    _set_altmap(device, 0)
    quick_mount.mount()
    assert len(os.listdir(quick_mount.path)) == 20
    quick_mount.umount()
    assert quick_mount.fsck().wrong == []


@pytest.mark.parametrize("replica", [0, 1])
def test_one_copy_of_a_page_overwritten(quick_mount: QuickMount, device: Path, replica: int) -> None:
    """The mount reads the other copy, rewrites the corrupt one, and reports the rewrite; fsck finds and
    repairs it.
    """
    page = metadata_pages(device)[0]
    for repair in (False, True):
        overwrite(device, page.offsets[replica] + 1000, b"\xa5" * 64)
        assert quick_mount.fsck().wrong == [f"metadata page 0 of db: copy {replica + 1} has a wrong checksum"]
        if repair:
            assert (quick_mount.fsck(repair=True).healed, quick_mount.fsck().wrong) == (1, [])
        quick_mount.mount()
        assert len(os.listdir(quick_mount.path)) == 20
        told = [(e["file"], e["page"], e["copy"]) for e in quick_mount.events("MetadataRewritten")]
        assert told == ([] if repair else [("db", 0, replica + 1)])
        quick_mount.umount()


@pytest.mark.parametrize("what", ["garbage", "ones"])
def test_both_superblocks_overwritten(quick_mount: QuickMount, device: Path, what: str) -> None:
    for place in superblocks(device):
        overwrite(device, place, random.Random(1).randbytes(PAGE) if what == "garbage" else b"\xff" * PAGE)
    assert "superblock" in refusal(quick_mount)
    assert quick_mount.fsck().wrong
    assert quick_mount.fsck(repair=True).wrong
    assert "superblock" in refusal(quick_mount)


def test_both_superblocks_zeroed(quick_mount: QuickMount, device: Path) -> None:
    """A mount must not take the device for a new one: all files would be lost."""
    for place in superblocks(device):
        overwrite(device, place, bytes(PAGE))
    with pytest.raises(DaxemuError):
        quick_mount.mount()


def test_overwritten_tables(quick_mount: QuickMount, device: Path, tmp_path: Path) -> None:
    """Bytes that changed without being poison, in both copies: refused in one line, or mounted; never a hang,
    never a traceback.
    """
    pristine = tmp_path / "pristine"
    restore(device, pristine)
    pages = [page for page in metadata_pages(device) if page.number < 12]
    refused = 0
    for seed in range(60):
        rng = random.Random(seed)
        restore(pristine, device)
        for _ in range(rng.choice([1, 3, 30])):
            page, at = rng.choice(pages), rng.randrange(PAGE)
            junk = rng.randbytes(rng.choice([1, 4, 64]))[: PAGE - at]
            for offset in page.offsets:
                overwrite(device, offset + at, junk)
        wrong = quick_mount.fsck().wrong
        assert all("Traceback" not in line for line in wrong)
        said = _refused(quick_mount)
        if said is not None:
            assert wrong, f"seed {seed}: a mount says {said}, fsck nothing"
            assert "\n" not in said, seed
            refused += 1
            continue
        subprocess.run(["ls", "-lR", quick_mount.path], capture_output=True, timeout=PATIENCE, check=False)
        quick_mount.umount("--force")
    assert refused > 0


def _refused(mount: QuickMount) -> str | None:
    try:
        mount.mount()
    except DaxemuError as error:
        return str(error)
    return None


def test_the_media_shrinks_during_a_mount(quick_mount: QuickMount) -> None:
    """A load beyond the end of the media raises SIGBUS in the supervisor: the mount is dead, and its log and
    status say so.
    """
    quick_mount.sound = False
    path = quick_mount.make_file("f", 1000)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    os.truncate(quick_mount.device / "media", PAGE)
    done = subprocess.run(
        ["cat", path], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=PATIENCE
    )
    assert done.returncode == 1, "cat read what is no longer there"
    daxemu("umount", "--force", quick_mount.path)
    assert mount_at(quick_mount.path) is None
    said = daxemu("mount", quick_mount.device, quick_mount.path, status=3)
    assert "media has 4096 bytes" in said
    wait_for_death(quick_mount.pid)


def test_no_place_for_events(quick_mount: QuickMount, device: Path) -> None:
    (device / "events.jsonl").unlink()
    (device / "events.jsonl").mkdir()
    said = daxemu("mount", device, quick_mount.path, status=3)
    assert said.count("\n") == 1
    assert "events.jsonl" in said
    assert mount_at(quick_mount.path) is None
    (device / "events.jsonl").rmdir()
    quick_mount.mount()
    assert len(os.listdir(quick_mount.path)) == 20
