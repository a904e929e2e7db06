"""Refusals: one line with the finding, the expectation and the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from daxemu.pmem.device_dir import DeviceConfig
from tests.support.core import Core
from tests.support.metadata import metadata_pages, overwrite, poison, superblocks
from tests.support.mount import DaxMount, daxemu
from tests.support.words import library_words


def _make(device: Path) -> None:
    daxemu("mkfs", device, "--size", "16M")


def _another_version(device: Path) -> None:
    _make(device)
    toml = device / "device.toml"
    toml.write_text(re.sub(r"^version = \d+", "version = 99", toml.read_text(), flags=re.MULTILINE))


def _truncated_media(device: Path) -> None:
    _make(device)
    with open(device / "media", "r+b") as media:
        media.truncate(4096)


def _no_poison_list(device: Path) -> None:
    _make(device)
    (device / "poison").write_text("everything\n")


def _garbage(device: Path) -> None:
    _make(device)
    (device / "media").write_bytes(b"\xff" * (16 << 20))


def _used(device: Path) -> None:
    core = Core(device, DeviceConfig(16 << 20))
    core.file(b"f", b"data")
    core.close()


def _one_superblock(device: Path) -> None:
    _used(device)
    overwrite(device, superblocks(device)[0], b"\xff" * 4096)


def _poisoned_superblocks(device: Path) -> None:
    _used(device)
    poison(device, *superblocks(device))


def _some_of_both(device: Path) -> None:
    """Poison one copy of a superblock, and both copies of an unused page."""
    _one_superblock(device)
    poison(device, *metadata_pages(device)[-1].offsets)


@pytest.mark.parametrize(
    ("prepare", "verb", "status", "said"),
    [
        (None, "fsck D", 3, "D is not a daxemu device: make one with: daxemu mkfs D --size 1G"),
        (None, "mkfs D --size 5000", 2, "size 5000: must be whole pages of 4K, from .*M to .*T"),
        (
            None,
            "mkfs D --size 16M --base-pfn 0xfffffffffffff1",
            2,
            "base pfn 0xfffffffffffff1: must be from 0 to 0xfffffffffffff",
        ),
        (
            None,
            "mkfs D --size 16M --altmap --no-struct-pages",
            2,
            "an altmap is room for struct pages: .*not both",
        ),
        (None, "status D", 3, "D is not on a daxemu mount: see daxemu status, or .* daxemu mount"),
        (None, "umount D", 3, "D is not a daxemu mountpoint: see daxemu status"),
        (_make, "mkfs D --size 16M", 4, "D exists already: give --force .*"),
        (_make, "mount D D/mnt", 2, "D/mnt is not a directory: make it with mkdir first"),
        (_make, "mount D /proc", 4, "/proc has another filesystem mounted on it: choose another directory"),
        (_make, "page-types D", 3, "D is not mounted, so it has no struct pages: daxemu mount D MOUNTPOINT"),
        (
            _another_version,
            "fsck D",
            3,
            "D is of format version 99, this daxemu reads 1: use .*",
        ),
        (_truncated_media, "fsck D", 3, "D/media has 4096 bytes, device.toml says 16777216: restore .*"),
        (
            _no_poison_list,
            "fsck D",
            3,
            "D/poison: not a list of 'sector count' lines; correct the file, or remove .*",
        ),
        (_garbage, "fsck D", 9, "D: 2 problems, which fsck --repair cannot fix: save what can be read, .*"),
        (_one_superblock, "fsck D", 9, "D: 1 problems; try fsck --repair"),
        (_poisoned_superblocks, "fsck D", 9, "D: 2 problems, which fsck --repair cannot fix: save what .*"),
        (_poisoned_superblocks, "fsck D --repair", 9, "D: 2 problems are left: save what can be read, .*"),
        (_poisoned_superblocks, "mount D MNT", 9, ".*the first is poisoned, the second is .*: daxemu fsck D"),
        (
            _some_of_both,
            "fsck D",
            9,
            "D: 2 problems; fsck --repair fixes 1 of them, for the rest save .*",
        ),
        (_some_of_both, "fsck D --repair", 9, "D: 1 problems are left: save what can be read, .*"),
        (_garbage, "fsck D --repair", 9, "D: 2 problems are left: save what can be read, .*"),
        (_garbage, "mount D MNT", 9, ".*neither superblock can be read .*; see: daxemu fsck D"),
    ],
)
def test_a_refusal(
    tmp_path: Path, prepare: Callable[[Path], None] | None, verb: str, status: int, said: str
) -> None:
    device, mountpoint = tmp_path / "pmem", tmp_path / "mnt"
    mountpoint.mkdir()
    if prepare is not None:
        prepare(device)
    words = [re.sub(r"^D\b", str(device), word).replace("MNT", str(mountpoint)) for word in verb.split()]
    expected = "daxemu: " + re.sub(r"\bD\b", re.escape(str(device)), said)
    refused = daxemu(*words, status=status)
    assert re.fullmatch(expected + "\n", refused), refused
    assert library_words(refused) is None


@pytest.mark.mount
@pytest.mark.parametrize(
    ("verb", "status", "said"),
    [
        ("inject M/f --offset 4K", 2, "0x1000+0x1 is past the end of /f, which has 0x1000 bytes"),
        ("inject M/hole", 2, "the range is a hole, .*: write there first, or see daxemu map FILE"),
        ("inject M/f --offset=-1", 2, "offset -1 is negative: give an offset from 0 to 4095 of /f"),
        ("inject M/f --offset 0 --offset 1 --length 1 --length 2 --length 3", 2, "2 offsets but 3 .*"),
        ("set M color=red", 2, "no setting 'color': there are early_kill, log_size, lost_store.*"),
        ("set M early_kill", 2, "'early_kill': give NAME=VALUE, such as early_kill=1"),
        ("set M early_kill=yes", 2, "early_kill=yes: must be 0 or 1"),
        ("mount DEV M", 4, "M is a daxemu mount already: daxemu umount M"),
        ("fsck DEV", 4, "DEV is mounted already: see daxemu status"),
        ("reflink M/f /tmp/f", 3, "/tmp/f is not on a daxemu mount: .*"),
    ],
)
def test_a_refusal_on_a_mount(dax_mount: DaxMount, verb: str, status: int, said: str) -> None:
    dax_mount.make_file("f", 1)
    with open(dax_mount.path / "hole", "wb") as hole:
        hole.truncate(4096)

    def here(text: str) -> str:
        text = re.sub(r"\bM\b", str(dax_mount.path), text)
        return re.sub(r"\bDEV\b", str(dax_mount.device), text)

    refused = daxemu(*[here(word) for word in verb.split()], status=status)
    assert re.fullmatch(f"daxemu: {here(said.replace('+', chr(92) + '+'))}\n", refused), refused
