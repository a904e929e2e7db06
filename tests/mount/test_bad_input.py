"""Refusals of the command line: one clear line, a stable exit status, and no change of the device."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from daxemu.host.proc.mountinfo import mount_at
from tests.support.mount import DaxMount, daxemu
from tests.support.scene import PAGE, PAGES, Scene, ask, letter, signals_of
from tests.support.words import library_words

pytestmark = pytest.mark.mount

INVALID, NOT_THERE, BUSY, GONE = 2, 3, 4, 7
"""Exit statuses of errors.py."""

Words = tuple[str | Path | int, ...]


def refuse(*arguments: str | Path | int, status: int) -> str:
    """Run ``daxemu ARGUMENTS``, which must fail with ``status``; return the error, one line."""
    text = daxemu(*arguments, status=status)
    assert library_words(text) is None, text
    assert text.startswith("daxemu: "), text
    assert text.count("\n") == 1, text
    assert text.endswith("\n")
    return text


def everything(mount: DaxMount) -> dict[str, Any]:
    """Return all state for comparison after a refusal."""
    status = mount.json("status", mount.path)
    return {
        "events": mount.events(),
        "files": {file.name: file.read_bytes() for file in mount.path.iterdir()},
        "usage": os.statvfs(mount.path),
        "state": {k: status[k] for k in ("state", "badblocks", "poisoned_sectors", "settings", "counters")},
    }


# -- ranges and paths


@pytest.mark.parametrize(
    ("options", "about"),
    [
        pytest.param(("--offset", PAGES * PAGE, "--length", PAGE), "past the end", id="past-the-end"),
        pytest.param(("--offset", 0, "--length", PAGES * PAGE + 1), "past the end", id="over-the-end"),
        pytest.param(("--offset", "7E", "--length", PAGE), "7E", id="no-such-unit"),
        pytest.param(("--offset", "8P", "--length", "8P"), "past the end", id="huge"),
        pytest.param(("--offset", 1 << 70, "--length", 1), "", id="beyond-64-bits"),
        pytest.param(("--offset", 0, "--length", 0), "length 0", id="zero-length"),
        pytest.param(("--offset", 0, "--length", "-4K"), "length -4096", id="negative-length"),
        pytest.param(("--offset", "-4K", "--length", "4K"), "offset -4096", id="negative-offset"),
        pytest.param(("--offset", "banana"), "banana", id="no-size"),
        pytest.param(("--offset", "0.3"), "0.3", id="part-of-a-byte"),
        pytest.param(("--offset", ""), "", id="empty"),
        pytest.param(("--offset", 0, "--offset", 4, "--length", 1, "--length", 2, "--length", 3), "3 lengths",
                     id="not-as-many"),
        pytest.param(("--offset", 0, "--offset", "1G", "--length", PAGE), "past the end", id="one-of-two"),
        pytest.param(("--depth", 3), "--depth", id="no-such-option"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["inject", "clear"])
def test_ranges(scene: Scene, verb: str, options: Words, about: str) -> None:
    before = everything(scene.mount)
    p0 = scene.mapper(touch=[0], before=["mcekill early"])
    assert about in refuse(verb, scene.mount.path / "f", *options, status=INVALID)
    assert signals_of(p0) == []
    assert p0.cmd("tr 0 0").ok == letter(0)
    assert everything(scene.mount) == before


def test_ranges_of_the_device(dax_mount: DaxMount) -> None:
    before = everything(dax_mount)
    refuse("inject", dax_mount.path, "--offset", "1G", status=INVALID)
    refuse("inject", dax_mount.path, "--offset", (1 << 30) - 512, "--length", 513, status=INVALID)
    assert everything(dax_mount) == before


def test_an_empty_file(dax_mount: DaxMount) -> None:
    (dax_mount.path / "empty").touch()
    refuse("inject", dax_mount.path / "empty", status=INVALID)


def test_paths(dax_mount: DaxMount, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"x" * PAGE)
    (dax_mount.path / "dir").mkdir()
    (dax_mount.path / "dangling").symlink_to("nowhere")
    os.mkfifo(dax_mount.path / "fifo")
    for verb in ("inject", "clear", "map"):
        for path in (outside, tmp_path / "missing", tmp_path, Path("/proc/self/mem")):
            refuse(verb, path, status=NOT_THERE)
        for name in ("missing", "dir", "dangling", "fifo", "dir/missing"):
            refuse(verb, dax_mount.path / name, status=INVALID)
    for verb in ("badblocks", "damaged", "scrub", "remove", "log", "status", "umount"):
        refuse(verb, tmp_path, status=NOT_THERE)
    refuse("set", tmp_path, "early_kill=1", status=NOT_THERE)
    refuse("umount", dax_mount.path / "dir", status=NOT_THERE)


def test_a_link_from_outside_leads_to_the_file(dax_mount: DaxMount, tmp_path: Path) -> None:
    file = dax_mount.make_file("f", 2)
    (tmp_path / "link").symlink_to(file)
    result = dax_mount.json("inject", tmp_path / "link", "--offset", PAGE, "--length", PAGE)
    assert [r["nr_pages"] for r in result["ranges"]] == [1]


@pytest.mark.parametrize(
    "setting",
    ["early_kill=2", "early_kill=", "early_kill", "lost_store=loud", "x=1", "=", ""]
    + [f"scrub_interval={bad}" for bad in ("", "-1", "often", "nan", "inf", "0.001", "1e3", "9" * 400)],
)
def test_settings(dax_mount: DaxMount, setting: str) -> None:
    before = everything(dax_mount)
    refuse("set", dax_mount.path, setting, status=INVALID)
    assert everything(dax_mount) == before


def test_none_of_several_settings_unless_all_are_good(dax_mount: DaxMount) -> None:
    before = everything(dax_mount)
    refuse("set", dax_mount.path, "early_kill=1", "lost_store=loud", status=INVALID)
    assert everything(dax_mount) == before


def test_reflinks(dax_mount: DaxMount, tmp_path: Path) -> None:
    path = dax_mount.path
    file = dax_mount.make_file("f", 4)
    (tmp_path / "outside").write_bytes(b"x" * PAGE)
    before = everything(dax_mount)
    refuse("reflink", path / "missing", path / "g", status=INVALID)
    refuse("reflink", tmp_path / "outside", path / "g", status=NOT_THERE)
    refuse("reflink", file, tmp_path / "g", status=NOT_THERE)
    refuse("reflink", file, path / "g", "--offset", 100, status=INVALID)
    refuse("reflink", file, path / "g", "--length", 100, status=INVALID)
    refuse("reflink", file, path / "g", "--offset", "1M", status=INVALID)
    refuse("reflink", file, path / "g", "--length", "-4K", status=INVALID)
    refuse("reflink", file, path / "g", "--dest-offset", 1, status=INVALID)
    refuse("reflink", file, path / "no" / "g", status=INVALID)
    refuse("reflink", file, path, status=INVALID)
    refuse("reflink", file, file, status=INVALID)
    assert not (tmp_path / "g").exists()
    assert everything(dax_mount) == before


def test_verbs(tmp_path: Path) -> None:
    for arguments in (("frobnicate",), ("inject",), ("mkfs", tmp_path / "d"), ("mount", tmp_path)):
        refuse(*arguments, status=INVALID)
    assert list(tmp_path.iterdir()) == []


# -- devices and mountpoints


@contextmanager
def second_device(made: DaxMount) -> Iterator[Path]:
    device = made.device.with_name(made.device.name + "b")
    daxemu("mkfs", device, "--size", "16M")
    try:
        yield device
    finally:
        subprocess.run(["rm", "-rf", device], check=True)


@pytest.mark.parametrize("size", ["0", "-1G", "4095", "1M", "8388609", "2000P", "1Z", "", "1e9", "nan"])
def test_sizes_no_device_can_have(tmp_path: Path, size: str) -> None:
    refuse("mkfs", tmp_path / "d", "--size", size, status=INVALID)
    assert list(tmp_path.iterdir()) == []


def test_options_no_device_can_have(tmp_path: Path) -> None:
    for options in (
        ("--base-pfn", "x"),
        ("--base-pfn", "-1"),
        ("--align", "3K"),
        ("--align", "2M", "--base-pfn", "0x100001"),
    ):
        refuse("mkfs", tmp_path / "d", "--size", "16M", *options, status=INVALID)
    assert list(tmp_path.iterdir()) == []


def test_mkfs_where_something_is(dax_mount: DaxMount, tmp_path: Path) -> None:
    dax_mount.make_file("f", 2)
    before = everything(dax_mount)
    refuse("mkfs", dax_mount.device, "--size", "1G", status=BUSY)
    refuse("mkfs", dax_mount.device, "--size", "1G", "--force", status=BUSY)
    assert everything(dax_mount) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("data")
    refuse("mkfs", other, "--size", "16M", status=BUSY)
    refuse("mkfs", other, "--size", "16M", "--force", status=NOT_THERE)
    assert (other / "precious").read_text() == "data"
    refuse("mkfs", other / "precious" / "d", "--size", "16M", status=INVALID)


def test_devices_that_are_none(tmp_path: Path) -> None:
    empty, mnt = tmp_path / "empty", tmp_path / "mnt"
    empty.mkdir()
    mnt.mkdir()
    (tmp_path / "file").write_text("x")
    for device in (empty, tmp_path / "missing", tmp_path / "file", Path("/dev/null")):
        refuse("mount", device, mnt, status=NOT_THERE)
        refuse("fsck", device, status=NOT_THERE)
    assert list(empty.iterdir()) == []
    assert mount_at(mnt) is None


@pytest.mark.parametrize("interval", ["-1", "often", "0.001", ""])
def test_a_scrub_interval_that_cannot_be(dax_mount: DaxMount, interval: str) -> None:
    dax_mount.umount()
    error = refuse("mount", dax_mount.device, dax_mount.path, "--scrub-interval", interval, status=INVALID)
    assert "--scrub-interval" in error
    assert mount_at(dax_mount.path) is None


@pytest.mark.parametrize("damage", ["toml", "version", "size", "no-media", "short-media", "poison"])
def test_devices_that_are_damaged(dax_mount: DaxMount, damage: str) -> None:
    dax_mount.umount()
    dax_mount.sound = False
    device = dax_mount.device
    config = device / "device.toml"
    match damage:
        case "toml":
            config.write_text("not = [toml")
        case "version":
            config.write_text(config.read_text().replace("version = 1", "version = 99"))
        case "size":
            config.write_text(config.read_text().replace("size = 1073741824", "size = 'big'"))
        case "no-media":
            (device / "media").unlink()
        case "short-media":
            os.truncate(device / "media", 1 << 20)
        case "poison":
            (device / "poison").write_text("many sectors")
    for verb in ("mount", "fsck"):
        refuse(verb, device, *([dax_mount.path] if verb == "mount" else []), status=NOT_THERE)
    assert mount_at(dax_mount.path) is None


def test_a_device_that_is_mounted_already(dax_mount: DaxMount, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    dax_mount.make_file("f", 2)
    before = everything(dax_mount)
    refuse("mount", dax_mount.device, other, status=BUSY)
    refuse("fsck", dax_mount.device, status=BUSY)
    assert mount_at(other) is None
    assert everything(dax_mount) == before


def test_mountpoints_that_cannot_be(dax_mount: DaxMount, tmp_path: Path) -> None:
    before = everything(dax_mount)
    (tmp_path / "file").write_text("x")
    used = tmp_path / "used"
    used.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", used], check=True)
    try:
        with second_device(dax_mount) as device:
            refuse("mount", device, dax_mount.path, status=BUSY)
            refuse("mount", device, used, status=BUSY)
            refuse("mount", device, tmp_path / "missing", status=INVALID)
            refuse("mount", device, tmp_path / "file", status=INVALID)
            assert not (device / "control.sock").exists()
            daxemu("fsck", device)
    finally:
        subprocess.run(["umount", used], check=True)
    assert everything(dax_mount) == before


def test_a_mount_in_use(scene: Scene) -> None:
    p0 = scene.actor()
    ask(p0, "open 0 f rw")
    error = refuse("umount", scene.mount.path, status=BUSY)
    assert "--force" in error
    assert p0.cmd(f"pread 0 0 {PAGE}").pages == letter(0)
    p0.close()
    scene.mount.umount()
    refuse("umount", scene.mount.path, status=NOT_THERE)
