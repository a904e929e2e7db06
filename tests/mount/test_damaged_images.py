"""Some images of the corruption fuzzer through the command line, with real mounts: mkfs to repair."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daxemu.host.proc.mountinfo import mount_at
from tests.support.core import core_at
from tests.support.corruption import Image, Pristine
from tests.support.mount import clear_away, finished

pytestmark = pytest.mark.mount

SEEDS = range(20)


@pytest.fixture(scope="module")
def pristines() -> Iterator[list[Pristine]]:
    with core_at() as clean, core_at() as killed:
        yield [Pristine(clean, is_clean=True), Pristine(killed, is_clean=False)]


def run(*arguments: str | Path) -> str | None:
    """Run a verb. Return None if the verb succeeds; otherwise its error, one line."""
    done = finished(*arguments)
    said = done.stderr.decode()
    if done.returncode == 0:
        return None
    assert done.returncode in (3, 5, 9), (arguments, done.returncode, said)
    assert said.startswith("daxemu: "), said
    assert said.count("\n") == 1, said
    return said


def walked(top: Path) -> dict[bytes, tuple[Any, ...]]:
    """Return by path the results of stat(2), readlink(2) and read(2); None for bytes that cannot be read."""
    found: dict[bytes, tuple[Any, ...]] = {}
    for path in (top, *top.rglob("*")):
        stat = path.lstat()
        data: bytes | None = b""
        if path.is_symlink():
            data = os.fsencode(path.readlink())
        elif path.is_file():
            try:
                data = path.read_bytes()
            except OSError:
                data = None
        plain = (stat.st_mode, stat.st_uid, stat.st_gid, stat.st_nlink, stat.st_size, stat.st_mtime_ns)
        found[os.fsencode(path)[len(os.fsencode(top)) :] or b"/"] = (*plain, data)
    return found


def expected(pristine: Pristine) -> dict[bytes, tuple[Any, ...]]:
    """Return the result of :func:`walked` on a healthy image."""
    return {
        path: (mode, uid, gid, nlink, size, times[1], target if target is not None else data)
        for path, (_, mode, uid, gid, nlink, _, size, times, target, _, _, data) in pristine.tree.items()
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_mount_walk_write_repair(pristines: list[Pristine], tmp_path: Path, seed: int) -> None:
    scratch = Path("/dev/shm") / f"daxemu-core-{os.getpid()}-mounted"
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    try:
        image = Image(pristines, scratch, seed)
        said = [run("fsck", image.path)]
        for verb in (
            ("mount", image.path, mnt),
            ("fsck", image.path, "--repair"),
            ("mount", image.path, mnt),
        ):
            said.append(run(*verb))
            if verb[0] != "mount" or said[-1] is not None:
                continue
            found = walked(mnt)
            if not image.is_sealed:
                right = expected(image.pristine)
                # Poisoned bytes are missing, and fsck has reported the loss.
                differ = {path for path in right.keys() | found.keys() if right.get(path) != found.get(path)}
                assert all(path in found and found[path][-1] is None for path in differ), sorted(differ)
            (mnt / "new").write_bytes(b"new" * 5000)
            (mnt / "new").unlink()
            os.utime(mnt, ns=(0, expected(image.pristine)[b"/"][5]))
            # By force: a test beside this one may have copied the mount into its namespace.
            run("umount", "--force", mnt)
            assert mount_at(mnt) is None
        if max(image.bad, default=0) == 1 and not image.is_sealed and not image.is_refused:
            assert said[1:] == [None, None, None], said
        assert not image.is_refused or None not in said[1:], said
    finally:
        clear_away(mnt)
        shutil.rmtree(scratch, ignore_errors=True)
