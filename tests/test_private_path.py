"""Paths below DEVICE: private whatever the umask, never through a link, and opened in one module alone."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import daxemu as daxemu_package
from daxemu.errors import DaxemuError, InvalidArgument, NotADevice, PermissionDenied
from daxemu.pmem.device_dir import (
    MIN_SIZE,
    OWN_DIRECTORIES,
    OWN_FILES,
    DeviceConfig,
    DeviceDir,
)
from tests.support.device_paths import modules, touches
from tests.support.elsewhere import daxemu_as_user
from tests.support.mount import daxemu

SECRET = "export PATH=/bin # first words of a secret\n"
FILES = sorted(OWN_FILES)
DIRECTORIES = sorted(OWN_DIRECTORIES)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that another user could prepare: ``pmem`` is a device, ``victim`` a file outside."""
    path = Path(tempfile.mkdtemp(prefix="daxemu-private-", dir="/dev/shm"))
    path.chmod(0o755)
    DeviceDir.create(path / "pmem", DeviceConfig(MIN_SIZE))
    (path / "victim").write_text(SECRET)
    (path / "outside").mkdir()
    (path / "mnt").mkdir()
    yield path
    shutil.rmtree(path)


def snapshot(place: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """Kind, owner, size and contents of every file."""
    found = {}
    for path in sorted(place.rglob("*")):
        info = path.lstat()
        data = path.read_bytes()[:4096] if stat.S_ISREG(info.st_mode) else b""
        found[str(path.relative_to(place))] = (info.st_mode, info.st_uid, info.st_size, data)
    return found


def refused_by_each_verb(place: Path, status: int, matching: str) -> None:
    """mount, fsck, mkfs --force and page-types end with one line and change nothing."""
    before = snapshot(place)
    pmem = place / "pmem"
    for verb in (
        ("mount", pmem, place / "mnt"),
        ("mount", pmem, place / "mnt", "--foreground"),
        ("fsck", pmem),
        ("mkfs", pmem, "--size", "8M", "--force"),
        ("page-types", pmem),
        ("log", pmem),
    ):
        said = daxemu(*verb, status=status)
        assert matching in said, said
        assert said.count("\n") == 1, said
        assert snapshot(place) == before


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_a_new_device_is_private_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        DeviceDir.create(tmp_path / "pmem", DeviceConfig(MIN_SIZE))
        with DeviceDir.open(tmp_path / "pmem"):
            modes = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in (tmp_path / "pmem").iterdir()}
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "pmem").stat().st_mode) == 0o700
    assert modes == dict.fromkeys(("media", "poison", "device.toml", "lock"), 0o600)


def test_a_device_is_shared_on_request(tmp_path: Path) -> None:
    daxemu("mkfs", tmp_path / "pmem", "--size", "8M", "--mode", "0750")
    assert stat.S_IMODE((tmp_path / "pmem").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "pmem" / "media").stat().st_mode) == 0o640
    assert DeviceDir.load(tmp_path / "pmem").config.mode == 0o750


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o600, 0o1700, 0o4700])
def test_a_device_that_others_may_write_to_is_refused(mode: int) -> None:
    with pytest.raises(InvalidArgument, match="0700 to 0755"):
        DeviceConfig(MIN_SIZE, mode=mode).validate()


@pytest.mark.parametrize("name", FILES + DIRECTORIES)
def test_a_link_in_a_device_is_refused(place: Path, name: str) -> None:
    (place / "pmem" / name).unlink(missing_ok=True)
    target = place / ("outside" if name in DIRECTORIES else "victim")
    (place / "pmem" / name).symlink_to(target)
    refused_by_each_verb(place, 3, "is a symbolic link")


@pytest.mark.parametrize("name", FILES + DIRECTORIES)
def test_a_fifo_in_a_device_is_refused(place: Path, name: str) -> None:
    (place / "pmem" / name).unlink(missing_ok=True)
    os.mkfifo(place / "pmem" / name)
    refused_by_each_verb(place, 3, "is a FIFO")


@pytest.mark.parametrize("name", sorted(OWN_FILES - {"control.sock", "device.toml"}))
def test_a_hard_link_in_a_device_is_refused(place: Path, name: str) -> None:
    (place / "pmem" / name).unlink(missing_ok=True)
    (place / "pmem" / name).hardlink_to(place / "victim")
    refused_by_each_verb(place, 3, "hard links")


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_a_link_deeper_in_a_device_is_refused(place: Path, directory: str) -> None:
    (place / "pmem" / directory / "inner").mkdir(parents=True)
    (place / "pmem" / directory / "inner" / "data.ninja").symlink_to(place / "victim")
    refused_by_each_verb(place, 3, "is a symbolic link")


def test_a_device_that_is_a_link_is_refused(place: Path) -> None:
    (place / "pmem").rename(place / "real")
    (place / "pmem").symlink_to(place / "real")
    refused_by_each_verb(place, 3, "is a symbolic link")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can have a device of another user")
def test_root_refuses_the_device_of_another_user(place: Path) -> None:
    os.chown(place / "pmem", 65534, 65534)
    refused_by_each_verb(place, 5, "--as-owner")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can have a file of another user")
def test_a_file_of_another_user_is_refused(place: Path) -> None:
    os.chown(place / "pmem" / "poison", 65534, 65534)
    refused_by_each_verb(place, 5, "belongs to uid 65534")


def as_user(uid: int, work: Callable[[], None]) -> int:
    """Run ``work`` in a process of another user; 0, or the exit status of a refusal."""
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            work()
            os._exit(0)
        except DaxemuError as error:
            os._exit(error.exit_status)
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("name", ["media", "poison", "device.toml"])
def test_another_user_reads_nothing(place: Path, name: str) -> None:
    def read() -> None:
        try:
            (place / "pmem" / name).read_bytes()
        except PermissionError as error:
            raise PermissionDenied("as it should be") from error

    assert as_user(65534, read) == PermissionDenied.exit_status
    assert as_user(65534, lambda: DeviceDir.load(place / "pmem").close()) == PermissionDenied.exit_status


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_as_owner_becomes_that_user_before_anything_is_opened(place: Path) -> None:
    """A user's link to a file of root's is refused as that user, and fsck of a good device works."""
    (place / "pmem").rename(place / "root-s")
    os.chown(place, 65534, 65534)
    made = place / "pmem"
    assert as_user(65534, lambda: DeviceDir.create(made, DeviceConfig(MIN_SIZE)).close()) == 0
    command = [*daxemu_as_user(), "fsck", str(made)]
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 5
    assert subprocess.run([*command, "--as-owner"]).returncode == 0
    assert (made / "lock").stat().st_uid == 65534
    (made / "lock").unlink()
    (made / "lock").symlink_to(place / "new-file")
    assert subprocess.run([*command, "--as-owner"]).returncode == 3
    assert not (place / "new-file").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_every_verb_on_a_device_has_as_owner(place: Path) -> None:
    """Each verb that opens a DEVICE refuses the device of another user, and takes --as-owner."""
    for name in ("mkfs", "fsck", "mount", "page-types", "log", "report"):
        assert "--as-owner" in daxemu(name, "--help"), name
    shutil.rmtree(place / "pmem")
    os.chown(place, 65534, 65534)
    made = place / "pmem"
    assert as_user(65534, lambda: DeviceDir.create(made, DeviceConfig(MIN_SIZE)).close()) == 0
    line = '{"event":"Unmounted","seq":1,"time":1.0,"mountpoint":"/of/before"}\n'
    (made / "events.jsonl").write_text(line)
    os.chown(made / "events.jsonl", 65534, 65534)
    output = place / "report.html"
    for verb in (["log", str(made)], ["report", str(made), "-o", str(output)]):
        command = [*daxemu_as_user(), *verb]
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (refused.returncode, refused.stderr.count("--as-owner")) == (5, 1)
        subprocess.run([*command, "--as-owner"], stdout=subprocess.DEVNULL, check=True)
    assert "/of/before" in output.read_text()
    assert output.stat().st_uid == 65534


@pytest.mark.mount
def test_an_old_device_is_tightened_at_mount(place: Path) -> None:
    """A device of an earlier daxemu is readable by all users, and has no mode in device.toml."""
    pmem = place / "pmem"
    text = (pmem / "device.toml").read_text()
    (pmem / "device.toml").write_text("".join(line for line in text.splitlines(True) if "mode" not in line))
    (pmem / "sysfs" / "memory_failure").mkdir(parents=True)
    (pmem / "events.jsonl").touch()
    for path in [pmem, *pmem.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    daxemu("mount", pmem, place / "mnt")
    try:
        assert (pmem / "control.sock").is_socket()
        modes = {stat.S_IMODE(path.lstat().st_mode) for path in [pmem, *pmem.rglob("*")]}
        assert modes == {0o700, 0o600}
    finally:
        daxemu("umount", place / "mnt")
    assert "others no longer have access" in daxemu("log", pmem)
    daxemu("mount", pmem, place / "mnt")
    daxemu("umount", place / "mnt")
    assert daxemu("log", pmem).count("others no longer have access") == 1


def test_links_that_come_later_are_not_followed(place: Path) -> None:
    """After the check of the whole device, each opening looks once more."""
    with DeviceDir.open(place / "pmem") as device:
        (place / "pmem" / "repair").symlink_to(place / "outside")
        (place / "pmem" / "events.jsonl").symlink_to(place / "victim")
        with pytest.raises(NotADevice, match="symbolic link"):
            (device.root / "events.jsonl").open(os.O_WRONLY | os.O_APPEND, create=True)
        with pytest.raises(NotADevice, match="symbolic link"):
            (device.root / "repair" / "mirror").mkdir()
        with pytest.raises(OSError, match="symbolic link"):
            (device.root / "repair").rmtree()
    assert (place / "victim").read_text() == SECRET
    assert list((place / "outside").iterdir()) == []


OPENER = "private_path.py"
ALLOWED = {
    ("cli/log.py", "lines_of"): "only whether a path is that of a device; DeviceDir opens it",
    ("client/connection.py", "_connect_through_directory"): "O_PATH, for the socket, whose peer is checked",
    ("evaluate/machine.py", "clear_away"): "removes the device of its own trial; rmtree follows no link",
    ("host/proc/device_lock.py", "_same"): "stat(2) of two directories",
    ("host/proc/device_lock.py", "holder_of"): "O_PATH and O_NOFOLLOW: root may ask about any user's device",
    ("host/proc/mountinfo.py", "mount_of"): "the path that a user names, as far as the mount",
    ("pmem/device_dir.py", "DeviceDir.create"): "whether anything has the name of a new device",
    ("pmem/device_dir.py", "_make_directories"): "makes the directory, which is opened and checked then",
    ("pytest_plugin/mount.py", "fresh_device"): "removes the device that it made; rmtree follows no link",
}
"""Functions that touch the path of a DEVICE, or of something below, in another way than by PrivatePath."""


def test_no_other_module_touches_a_path_below_a_device() -> None:
    sources = modules(Path(daxemu_package.__file__).parent)
    del sources[OPENER]
    found = touches(sources)
    assert [touch for touch in found if (touch.module, touch.function) not in ALLOWED] == []
    assert {(touch.module, touch.function) for touch in found} == set(ALLOWED)


PLANTED = {
    "open": 'def f(device): open(device / "events.jsonl")',
    "attribute": 'def f(mount): (mount.device / "lock").unlink()',
    "whole path": "def f(device): os.listdir(device)",
    "joined": 'def f(device): os.stat(os.path.join(device, "media"))',
    "text": 'def f(device): open(f"{device}/media", "rb")',
    "variable": 'def f(device):\n    log = Path(device).absolute() / "supervisor.log"\n    log.read_text()',
    "two steps": 'def f(self):\n    top = self.device\n    log = top / "x"\n    return log.read_bytes()',
    "argument": 'def f(device): g(device / "media")\ndef g(what): return what.stat()',
    "keyword": "def f(device): g(b=device)\ndef g(a, b): return shutil.rmtree(b)",
    "two calls": "def f(device): g(device)\ndef g(a): h(a)\ndef h(b): os.open(b, 0)",
    "method": 'class A:\n    def f(self, device): self.g(device)\n    def g(self, a): (a / "x").touch()',
    "in a loop": 'def f(device):\n    for path in [device / "a", device / "b"]:\n        path.exists()',
    "another name": "def f(where):\n    DeviceDir.look(where)\n    (where / 'lock').exists()",
    "database": 'def f(device): sqlite3.connect(str(device / "db"))',
    "array": 'def f(device): numpy.memmap(device / "media")',
    "socket": "def f(mount): mount.device.with_name('x').is_socket()",
    "walrus": "def f(device):\n    if (log := device / 'x').exists(): pass",
    "lambda": "def f(device): return lambda: open(device / 'x')",
}


@pytest.mark.parametrize("code", PLANTED.values(), ids=PLANTED)
def test_the_rule_finds_a_planted_touch(code: str) -> None:
    assert len(touches({"planted.py": code})) == 1


@pytest.mark.parametrize(
    "code",
    [
        'def f(device): raise Busy(f"{device} is in use")',
        'def f(device): PrivatePath.at(device) / "media"',
        "def f(device): return Path(device).absolute().name",
        'def f(mountpoint): os.stat(mountpoint / "file")',
        'def f(directory): (directory.root / "media").open(os.O_RDWR)',
    ],
)
def test_the_rule_leaves_the_rest_alone(code: str) -> None:
    assert touches({"fine.py": code}) == []
