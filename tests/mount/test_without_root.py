"""Every operation that FUSE allows an ordinary user, as user nobody with fusermount3."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from daxemu.uapi import BUS_MCEERR_AO
from tests.support.actor import compile_victim
from tests.support.elsewhere import NOBODY, SYSTEM_PYTHON, daxemu_as_user
from tests.support.mount import PATIENCE, clear_away
from tests.support.own_node import fuse_for_everybody

pytestmark = pytest.mark.mount


@dataclass
class User:
    """Another user with files below ``home``, which belongs to that user, and with ``device`` mounted at
    ``mnt``.
    """

    daxemu: tuple[str, ...]
    home: Path

    @property
    def mnt(self) -> Path:
        return self.home / "mnt"

    @property
    def device(self) -> Path:
        return self.home / "pmem"

    def __call__(self, *command: str | Path, status: int = 0) -> str:
        """Run a command as the user; return its output."""
        done = subprocess.run(
            [*NOBODY, *map(str, command)],
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == status, f"{command}: exit {done.returncode}\n{done.stdout}"
        return done.stdout

    def dax(self, *arguments: str | Path, status: int = 0) -> str:
        """Run daxemu as he."""
        return self(*self.daxemu, *arguments, status=status)

    def json(self, *arguments: str | Path) -> Any:
        return json.loads(self.dax(*arguments, "--json"))


@pytest.fixture
def node() -> Iterator[None]:
    """A mount namespace of the test's own, in which ordinary users may open /dev/fuse."""
    if shutil.which("fusermount3") is None:
        pytest.skip("no fusermount3 here: apt-get install fuse3")
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    with fuse_for_everybody():
        yield


@pytest.fixture
def user(node: None) -> Iterator[User]:
    """An ordinary user with a file ``f`` of four pages, A to D, on a mount of their own."""
    made = User(daxemu_as_user(), Path(tempfile.mkdtemp(prefix="daxemu-user-", dir="/dev/shm")))
    os.chown(made.home, 65534, 65534)
    try:
        made("mkdir", made.mnt)
        made.dax("mkfs", made.device, "--size", "256M")
        made.dax("mount", made.device, made.mnt)
        made("sh", "-c", "for c in A B C D; do head -c 4096 /dev/zero | tr '\\0' $c; done > mnt/f")
        yield made
        if made.mnt in [Path(found["mountpoint"]) for found in made.json("status")]:
            made.dax("umount", "--force", made.mnt)
        assert made.json("fsck", made.device)["wrong"] == []
    finally:
        clear_away(made.mnt)
        shutil.rmtree(made.home)


def test_the_demo_keeps_its_promises(user: User) -> None:
    """The demo shows exact AO and AR, reflinks found in other processes, and removal."""
    result = json.loads(user(*user.daxemu, "demo", "--json"))
    assert result["kept"], result


def test_files(user: User) -> None:
    user("sh", "-ec", "cd mnt; mkdir -p a/b; ln f hard; ln -s f soft; mv f a/b/g; chmod 600 a/b/g; sync hard")
    assert user("stat", "-c", "%U %a %h", "mnt/a/b/g").split() == ["nobody", "600", "2"]
    assert "Operation not permitted" in user("chown", "root", "mnt/hard", status=1)
    user.dax("umount", user.mnt)
    user.dax("mount", user.device, user.mnt)
    assert user("head", "-c", "1", "mnt/hard") == "A"


def test_cp_and_reflink_share(user: User) -> None:
    user("cp", "mnt/f", "mnt/copied")
    user.dax("reflink", user.mnt / "f", user.mnt / "linked")
    assert [extent["shared_by"] for extent in user.json("map", user.mnt / "f")["extents"]] == [3]


def test_poison_is_found_read_overwritten_and_cleared(user: User) -> None:
    user.dax("inject", user.mnt / "f", "--offset", "4K")
    assert "Input/output error" in user("cat", "mnt/f", status=1)
    assert [found["offset"] for found in user.json("damaged", user.mnt)["files"]] == [4096]
    user("dd", "if=/dev/zero", "of=mnt/f", "bs=4K", "seek=1", "count=1", "conv=notrunc", "status=none")
    assert user.json("damaged", user.mnt)["files"] == []
    user.dax("inject", user.mnt / "f", "--latent")
    assert user.json("badblocks", user.mnt)["sectors"] == 0
    assert user.json("scrub", user.mnt)["bytes"] == 4096
    assert user.json("clear", user.mnt)["bytes"] == 4096
    assert user("head", "-c", "1", "mnt/f") == "\0"


def test_settings_status_and_log(user: User) -> None:
    user.dax("set", user.mnt, "early_kill=1", "lost_store=eio")
    status = user.json("status", user.mnt)
    assert (status["settings"]["early_kill"], status["state"]) == ("1", "mounted")
    assert "set early_kill=1" in user.dax("log", user.mnt)


def test_run(user: User) -> None:
    """madvise(MADV_HWPOISON) of the user's program works."""
    said = user(*user.daxemu, "run", user.mnt, "--", compile_victim("poisoner"), "load", "mnt/f", "1")
    assert "main: code 4 page 1 lsb 12" in said


STORE_TO_AN_UNLINKED_FILE = """
import mmap, os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGBUS])
fd = os.open("mnt/h", os.O_RDWR | os.O_CREAT)
os.unlink("mnt/h")
os.truncate(fd, 1 << 20)
view = mmap.mmap(fd, 1 << 20)
view[1 << 18] = 1
assert os.lseek(fd, 0, os.SEEK_DATA) == 1 << 18
print(fd, flush=True)
print(signal.sigwaitinfo([signal.SIGBUS]).si_code)
"""


def test_a_process_that_stored_to_an_unlinked_file_is_remembered(user: User) -> None:
    """Without root no file handle can be opened: the page is revoked to be written back, and the process
    signalled.
    """
    user.dax("set", user.mnt, "early_kill=1")
    command = [*NOBODY, SYSTEM_PYTHON, "-c", STORE_TO_AN_UNLINKED_FILE]
    with subprocess.Popen(command, cwd=user.home, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            file = f"/proc/{process.pid}/fd/{int(process.stdout.readline())}"
            where = ("--offset", str(1 << 18), "--length", "4K")
            (outcome,) = user.json("inject", file, *where)["ranges"]
            assert (outcome["outcome"], outcome["processes"], outcome["signals"]) == ("Recovered", 1, 1)
            assert process.communicate(timeout=PATIENCE)[0] == f"{BUS_MCEERR_AO}\n"
        finally:
            process.kill()


def test_removal(user: User) -> None:
    user.dax("remove", user.mnt)
    assert user.json("status", user.mnt)["state"] == "removed"
    assert "Input/output error" in user("cat", "mnt/f", status=1)


def test_power_failure(user: User) -> None:
    """The abort file in fusectl belongs to the mount's owner."""
    user("sync", "mnt/f")
    user.dax("powerfail", user.mnt)
    user.dax("mount", user.device, user.mnt)
    assert user("head", "-c", "1", "mnt/f") == "A"


def test_others_stay_out(user: User) -> None:
    """Without allow_other even root cannot open the files, but may ask the supervisor."""
    with pytest.raises(PermissionError):
        os.listdir(user.mnt)
    stranger = ("setpriv", "--reuid=65533", "--regid=65533", "--clear-groups")
    done = subprocess.run(
        [*stranger, *user.daxemu, "status", str(user.mnt)],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 5
    assert "another user" in done.stderr
    listed = subprocess.run(
        [*stranger, *user.daxemu, "status"],
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"{user.mnt}  ({user.device})  not ours" in listed.stdout
