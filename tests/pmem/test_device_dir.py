"""The DEVICE directory: contents, users, and refusals with a clear error."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from daxemu.errors import Busy, DaxemuError, InvalidArgument, NoSpace, NotADevice, Unsupported
from daxemu.pmem import backing, media
from daxemu.pmem.device_dir import MAX_SIZE, MIN_SIZE, DeviceConfig, DeviceDir, altmap_bytes
from daxemu.private_path import PrivatePath
from daxemu.uapi import PAGE_SIZE

GOOD = DeviceConfig(MIN_SIZE)


def test_a_created_device_can_be_loaded(tmp_path: Path) -> None:
    config = DeviceConfig(16 << 20, base_pfn=0x240000, altmap=2 << 20, align=2 << 20)
    DeviceDir.create(tmp_path / "pmem0", config)
    loaded = DeviceDir.load(tmp_path / "pmem0")
    assert loaded.config == config
    assert loaded.name == "pmem0"


def test_a_6_tib_device_allocates_no_space(tmp_path: Path) -> None:
    path = Path("/dev/shm") / f"daxemu-dir-{os.getpid()}"
    device = DeviceDir.create(path, DeviceConfig(6 << 40))
    try:
        assert (path / "media").stat().st_blocks == 0
    finally:
        device.wipe()
    assert not path.exists()


def test_altmap_is_64_bytes_a_page() -> None:
    assert altmap_bytes(6 << 40) == 96 << 30
    assert altmap_bytes(8 << 20) == 128 << 10


@pytest.mark.parametrize(
    "config",
    [
        DeviceConfig(0),
        DeviceConfig(-PAGE_SIZE),
        DeviceConfig(MIN_SIZE - PAGE_SIZE),
        DeviceConfig(MIN_SIZE + 1),
        DeviceConfig(MAX_SIZE + PAGE_SIZE),
        DeviceConfig(MIN_SIZE, align=8192),
        DeviceConfig(MIN_SIZE, align=0),
        DeviceConfig(MIN_SIZE, base_pfn=0x100001, align=2 << 20),
        DeviceConfig(16 << 20, altmap=1 << 20, align=2 << 20),
        DeviceConfig(MIN_SIZE, altmap=PAGE_SIZE),
        DeviceConfig(2 * MIN_SIZE, altmap=100),
        DeviceConfig(2 * MIN_SIZE, altmap=-PAGE_SIZE),
        DeviceConfig(MIN_SIZE, base_pfn=-1),
        DeviceConfig(MIN_SIZE, base_pfn=1 << 52),
    ],
    ids=str,
)
def test_an_invalid_config_is_refused_and_no_file_is_created(tmp_path: Path, config: DeviceConfig) -> None:
    with pytest.raises(InvalidArgument):
        DeviceDir.create(tmp_path / "pmem0", config)
    assert list(tmp_path.iterdir()) == []


def test_the_smallest_and_the_largest_size_are_valid() -> None:
    DeviceConfig(MIN_SIZE).validate()
    DeviceConfig(MAX_SIZE).validate()
    DeviceConfig(2 * MIN_SIZE, altmap=MIN_SIZE).validate()


# -- creating


def test_an_existing_device_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "pmem0").mkdir()
    (tmp_path / "pmem0" / "precious").write_text("x")
    with pytest.raises(Busy, match="--force"):
        DeviceDir.create(tmp_path / "pmem0", GOOD)
    with pytest.raises(NotADevice):
        DeviceDir.create(tmp_path / "pmem0", GOOD, force=True)
    assert (tmp_path / "pmem0" / "precious").read_text() == "x"


def test_force_replaces_an_unmounted_device(tmp_path: Path) -> None:
    path = tmp_path / "pmem0"
    DeviceDir.create(path, GOOD)
    (path / "poison").write_text("1 1\n")
    DeviceDir.create(path, DeviceConfig(2 * MIN_SIZE), force=True)
    assert DeviceDir.load(path).config.size == 2 * MIN_SIZE
    assert (path / "poison").read_text().strip() == ""


def test_force_does_not_replace_a_mounted_device(tmp_path: Path) -> None:
    path = tmp_path / "pmem0"
    DeviceDir.create(path, GOOD)
    with DeviceDir.open(path), pytest.raises(Busy, match="mounted"):
        DeviceDir.create(path, DeviceConfig(2 * MIN_SIZE), force=True)
    assert DeviceDir.load(path).config == GOOD


def test_force_leaves_a_device_with_foreign_files_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "pmem0"
    DeviceDir.create(path, GOOD)
    (path / "precious").write_text("x")
    with pytest.raises(DaxemuError):
        DeviceDir.create(path, DeviceConfig(2 * MIN_SIZE), force=True)
    assert (path / "precious").read_text() == "x"
    assert DeviceDir.load(path).config == GOOD


def test_an_impossible_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DaxemuError):
        DeviceDir.create(tmp_path / "file" / "pmem0", GOOD)
    assert (tmp_path / "file").read_text() == "x"


def test_a_device_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    """A file of 32 TiB is more than most filesystems allow. Created parent directories are removed, too."""
    large = 32 << 40
    try:
        os.truncate(os.open(tmp_path / "probe", os.O_CREAT | os.O_WRONLY), large)
    except OSError:
        (tmp_path / "probe").unlink()
    else:
        pytest.skip("this filesystem takes a file of 32 TiB")
    with pytest.raises(NoSpace):
        DeviceDir.create(tmp_path / "a" / "b" / "pmem0", DeviceConfig(large))
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_cannot_be_mapped_here_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """create() leaves an existing device untouched; load() refuses a device created on another machine."""
    monkeypatch.setattr(backing, "_is_mappable", lambda size: size <= 1 << 40)
    path = tmp_path / "pmem0"
    DeviceDir.create(path, GOOD)
    with pytest.raises(Unsupported, match="the largest that does is 1T"):
        DeviceDir.create(path, DeviceConfig(3 << 40), force=True)
    assert DeviceDir.load(path).config == GOOD


def test_media_too_large_to_be_mapped_are_refused() -> None:
    """A device may have been created on a machine with a larger address space."""
    if backing._is_mappable(1 << 47):
        pytest.skip("a process can map 128 TiB here")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        (Path(directory) / "media").touch()
        os.truncate(Path(directory) / "media", 1 << 47)
        with pytest.raises(Unsupported, match="128T does not fit into the address space"):
            media.Media(PrivatePath.at(Path(directory)), 1 << 47)


# -- opening


def test_one_opener_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "pmem0"
    DeviceDir.create(path, GOOD)
    with DeviceDir.open(path):
        with pytest.raises(Busy, match="mounted"):
            DeviceDir.open(path)
        assert DeviceDir.load(path).config == GOOD
    DeviceDir.open(path).close()


def test_a_path_without_a_device_is_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(NotADevice, match="mkfs"):
            DeviceDir.open(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("version = 1", "version = 2"),
        ("version = 1", ""),
        ("size = 8388608", ""),
        ("size = 8388608", "size = 12"),
        ("size = 8388608", "size = -8388608"),
        ("size = 8388608", "size = 'big'"),
        ("size = 8388608", "size = true"),
        ("size = 8388608", "size = inf"),
        ("size = 8388608", "size = nan"),
        ("size = 8388608", "size = 8388608.5"),
        ("size = 8388608", "size = [8388608]"),
        ("size = 8388608", "size = 2024-01-01"),
        ("align = 4096", "align = 5"),
        ("altmap = 0", "altmap = 8388608"),
        ("base_pfn = 0x100000", "base_pfn = -1"),
        ("version = 1", "version = = 1"),
        ("version = 1", "\x00"),
    ],
)
def test_a_damaged_device_toml_is_refused(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "pmem0"
    DeviceDir.create(path, GOOD)
    text = (path / "device.toml").read_text()
    assert old in text
    (path / "device.toml").write_text(text.replace(old, new))
    with pytest.raises(NotADevice) as caught:
        DeviceDir.open(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_device_toml_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pmem0"
    DeviceDir.create(path, GOOD)
    (path / "device.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(NotADevice):
        DeviceDir.load(path)
    (path / "device.toml").unlink()
    (path / "device.toml").mkdir()
    with pytest.raises(NotADevice):
        DeviceDir.load(path)
