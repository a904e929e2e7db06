"""After a crash no file shows bytes written to another file, although blocks have changed owners
meanwhile.
"""

from __future__ import annotations

import os
import random

import pytest

from tests.mount.test_durability import MIB, sync
from tests.support.files import Files
from tests.support.quick import QuickMount
from tests.support.scene import PAGE, append_until_full
from tests.support.syscalls import KEEP_SIZE, PUNCH_HOLE, clone_range, fallocate

pytestmark = [pytest.mark.mount, pytest.mark.parametrize("how", ["kill", "powerfail"])]


@pytest.mark.parametrize("quick_mount", [16 * MIB], indirect=True)
@pytest.mark.parametrize("seed", range(4))
def test_freed_blocks_that_others_use(quick_mount: QuickMount, how: str, seed: int) -> None:
    """Each file holds one letter of its own: every byte read is the file's letter, or zero in a hole."""
    top, rng = quick_mount.path, random.Random(seed)
    old = {f"old{i}": bytes([97 + i]) * rng.randrange(1, MIB) for i in range(8)}
    for name, data in old.items():
        (top / name).write_bytes(data)
    sync(top)
    for name in rng.sample(sorted(old), 5):
        if rng.random() < 0.5:
            (top / name).unlink()
        else:
            os.truncate(top / name, rng.randrange(len(old[name])))
    new = {f"new{i}": bytes([65 + i]) * rng.randrange(1, MIB) for i in range(6)}
    for name, data in new.items():
        (top / name).write_bytes(data)
    if seed % 2:
        append_until_full(top / "rest", b"r")
    quick_mount.crash(how)
    for path in top.iterdir():
        data = path.read_bytes()
        letter = old.get(path.name, new.get(path.name, b"r"))[:1]
        assert data.strip(letter + b"\0") == b"", f"{path.name} shows bytes of another file"
        if data == old.get(path.name):
            assert data.strip(letter) == b""


def test_a_partly_written_block_is_zero_elsewhere(quick_mount: QuickMount, how: str) -> None:
    """After a crash the free blocks still hold old bytes."""
    top = quick_mount.path
    (top / "lost").write_bytes(b"secret" * MIB)
    quick_mount.crash(how)
    with (top / "f").open("wb") as file:
        for page in range(0, 3000, 2):
            os.pwrite(file.fileno(), b"x", page * PAGE + 100)
    data = (top / "f").read_bytes()
    assert data.count(b"x") == 1500
    assert data.strip(b"x\0").replace(b"x", b"").strip(b"\0") == b""


@pytest.mark.parametrize("undo", ["unlink", "truncate", "punch", "overwrite"])
def test_a_clone_that_was_given_up(quick_mount: QuickMount, how: str, undo: str) -> None:
    """The blocks of a deleted clone belong to one file only, until a crash restores the clone: the clone must
    not show later bytes of the file.
    """
    with Files(quick_mount) as files:
        one, two = files.letters("one", 8), files.open("two")
        clone_range(two, one)
        os.fsync(two)
        if undo == "unlink":
            (quick_mount.path / "two").unlink()
            files.close("two")
        elif undo == "truncate":
            os.ftruncate(two, 0)
        elif undo == "punch":
            fallocate(two, PUNCH_HOLE | KEEP_SIZE, 0, 8 * PAGE)
        else:
            os.pwrite(two, b"2" * 8 * PAGE, 0)
        os.pwrite(one, b"1" * 8 * PAGE, 0)
        quick_mount.crash(how)
    path = quick_mount.path / "two"
    data = path.read_bytes() if path.exists() else b""
    assert b"1" not in data, "the clone shows what was written to its source"
