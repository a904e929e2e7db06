"""A daxemu without host/fuse/supplement.c: only the operations that pyfuse3 lacks do not work."""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import daxemu as package
from tests.support.actor import Actor
from tests.support.mount import PATIENCE, DaxMount, clear_away
from tests.support.scene import PAGE, letter, signals_of
from tests.support.syscalls import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, clone_range, extent_map, fallocate

pytestmark = pytest.mark.mount


@dataclass
class BareMount(DaxMount):
    """A mount by another copy of daxemu, in ``source``."""

    source: Path = Path()

    def run(self, *arguments: str | Path | int, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "daxemu", *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(self.source)},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            cwd="/",
        )
        assert done.returncode == status, f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stderr if status else done.stdout


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[BareMount]:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(package.__file__).parent, source / "daxemu", ignore=ignored)
    device, path = Path("/dev/shm") / f"daxemu-bare-{os.getpid()}", tmp_path / "mnt"
    path.mkdir()
    made = BareMount(device, path, source=source)
    try:
        made.run("mkfs", device, "--size", "256M")
        made.mount()
        yield made
        made.umount()
        made.run("fsck", device)
    finally:
        clear_away(path)
        shutil.rmtree(device, ignore_errors=True)


def test_status_names_the_missing_parts(bare: BareMount) -> None:
    assert "supplement.c was not built" in bare.json("status", bare.path)["supplement"]
    assert "supplement  supplement.c was not built: install libfuse3-dev" in bare.run("status", bare.path)


def test_the_operations_that_are_missing(bare: BareMount) -> None:
    """The kernel answers EOPNOTSUPP, as for any filesystem without them; lseek sees one run of data."""
    path = bare.make_file("f", 4)
    with path.open("r+b") as file, (bare.path / "g").open("w+b") as other:
        fd = file.fileno()
        for mode in (0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE):
            with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
                fallocate(fd, mode, 0, PAGE)
        with pytest.raises(OSError, match=r"not implemented|Inappropriate"):
            extent_map(fd)
        with pytest.raises(OSError, match=r"not implemented|Inappropriate"):
            clone_range(other.fileno(), fd)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 0
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 4 * PAGE
        assert os.copy_file_range(fd, other.fileno(), 3 * PAGE, 0, 0) == 3 * PAGE
        assert os.pread(other.fileno(), 4 * PAGE, 0) == path.read_bytes()[: 3 * PAGE]
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 4 * PAGE


def test_everything_else(bare: BareMount) -> None:
    path = bare.make_file("f", 8)
    subprocess.run(["cp", "-a", path, bare.path / "copy"], check=True, timeout=PATIENCE)
    assert (bare.path / "copy").read_bytes() == path.read_bytes()
    assert bare.json("map", bare.path / "copy")["extents"][0]["shared_by"] == 1
    bare.run("reflink", path, bare.path / "clone")
    assert bare.json("map", bare.path / "clone")["extents"][0]["shared_by"] == 2
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 8 * PAGE) as view:
        view[2 * PAGE] = ord("z")
        view.flush()
    assert (bare.path / "clone").read_bytes() == (bare.path / "copy").read_bytes()
    (bare.path / "copy").rename(bare.path / "moved")
    (bare.path / "clone").unlink()
    os.truncate(path, 5 * PAGE + 1)
    expected = {p.name: p.read_bytes() for p in bare.path.iterdir()}
    assert len(expected["f"]) == 5 * PAGE + 1
    bare.umount()
    bare.mount()
    assert {p.name: p.read_bytes() for p in bare.path.iterdir()} == expected


def test_poison(bare: BareMount) -> None:
    """AO works as always. The consumer is unknown without the supplement: an untraced process gets the
    kernel's own BUS_ADRERR.
    """
    path = bare.make_file("f", 64)
    path.stat()  # at a new mtime the kernel drops the file's pages: only the supplement prevents that
    bare.run("set", bare.path, "early_kill=1")
    with Actor.spawn("p0", cwd=bare.path) as p0:
        for command in ("open 0 f rw", "mmap 0 0 0 64 shared", "tr 0 40"):
            p0.cmd(command)
        bare.inject("f", (40 * PAGE, PAGE))
        assert [(s["code"], s["addr"]) for s in signals_of(p0)] == [("BUS_MCEERR_AO", f"m0+{40 * PAGE:#x}")]
        assert p0.cmd("tr 0 40").faulted
        assert [(s["sig"], s["addr"]) for s in signals_of(p0)] == [("SIGBUS", f"m0+{40 * PAGE:#x}")]
        assert p0.cmd("pread 0 163840 4096").errno == "EIO"
        assert p0.cmd("pwrite 0 163840 4096 n").ret == PAGE
        assert p0.cmd("tr 0 40").ok == "n"
        assert p0.cmd("tr 0 3").ok == letter(3)
    lost = json.loads(bare.run("damaged", bare.path, "--json"))["files"]
    assert lost == []
    assert path.stat().st_size == 64 * PAGE
