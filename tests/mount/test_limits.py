"""Each request at a limit, beside a reader: answered right, and no step of the event loop does too much.

Work is counted in units (links, bytes, events, lookups), not in time: see tests/support/steps.py. The longest
wait of the reader and the longest step are printed, and stored as user properties of the test report.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from daxemu.client import Client
from daxemu.events import PoisonInjected
from daxemu.pmem.backing import fallocate
from daxemu.uapi import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, PAGE_SIZE
from tests.mount.test_tmpfile import make as without_a_name
from tests.support.quick import QuickMount, quick_mount_at
from tests.support.syscalls import clone_range, link_open_file
from tests.support.zygote import Zygote

pytestmark = pytest.mark.mount
GIB = 1 << 30
MANY = 4000
"""Ranges, extents or names: eight times the work of one step. A request holds up to 190,000."""
BAD = 1500
"""Ranges of one injection: 12 times the work of one step."""
MOST = {
    "links": 1200,
    "bytes": 40 << 20,
    "events": 600,
    "lookups": 6000,
    "names": 2500,
    "rows": 4000,
}
"""Units of work of one step of the event loop. Rows of a commit: 2,000 changes start the commit, and the last
piece of a verb before it changes up to three times 512 links (fs/pieces).
"""


class Reader(threading.Thread):
    """Reads a file past the page cache, and looks a name up, again and again. ``worst`` is the longest wait
    in seconds.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self.over = threading.Event()
        self.worst = 0.0
        self.reads = 0
        self.errors: list[OSError] = []

    def run(self) -> None:
        while not self.over.is_set():
            began = time.monotonic()
            try:
                self._read()
            except OSError as error:
                self.errors.append(error)
            self.worst = max(self.worst, time.monotonic() - began)
            self.reads += 1
            time.sleep(0.001)

    def _read(self) -> None:
        fd = os.open(self._path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(fd, PAGE_SIZE, 0) == b"A" * PAGE_SIZE
        finally:
            os.close(fd)
        assert not self._path.with_name(f"none-{self.reads}").exists()


@pytest.fixture
def measured(tmp_path: Path, zygote: Zygote) -> Iterator[QuickMount]:
    """A mount of 4 GiB whose supervisor writes its longest step to ``steps``."""
    with quick_mount_at(tmp_path, zygote, 4 * GIB, mount=False) as mount:
        mount.mount("measure_steps", str(tmp_path / "steps"))
        yield mount


def _ranges(count: int = BAD) -> list[list[int]]:
    return [[GIB + number * PAGE_SIZE, 512] for number in range(count)]


def _ino(path: Path) -> int:
    return path.stat().st_ino


def _of_many_extents(mount: QuickMount) -> Path:
    path = mount.path / "extents"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    _write_extents(fd, MANY)
    os.close(fd)
    return path


def _write_extents(fd: int, count: int) -> None:
    for number in range(count):
        os.pwrite(fd, b"x", number * 2 * PAGE_SIZE)


def _of_a_gib(mount: QuickMount) -> Path:
    path = mount.path / "long"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, GIB)
    return path


def _free(mount: QuickMount) -> int:
    return os.statvfs(mount.path).f_bfree


def inject_many(client: Client, mount: QuickMount) -> None:
    """Inject many ranges by one request."""
    done = client.request("inject", ranges=_ranges())
    assert [each["offset"] for each in done["ranges"]] == [offset for offset, _ in _ranges()]
    assert {each["outcome"] for each in done["ranges"]} == {"Recovered"}
    assert client.request("status")["badblocks"] == BAD


def inject_latent_and_scrub(client: Client, mount: QuickMount) -> None:
    """Inject latent poison, and find all of it by a scrub."""
    client.request("inject", ranges=_ranges(), latent=True)
    assert client.request("scrub")["bytes"] == BAD * 512


def inject_into_many_extents(client: Client, mount: QuickMount) -> None:
    """Inject into one range with many extents, then list the damaged file ranges."""
    path = _of_many_extents(mount)
    done = client.request("inject", ino=_ino(path), ranges=[[0, BAD * 2 * PAGE_SIZE]])
    assert len(done["ranges"]) == BAD
    lost = client.request("damaged")["files"]
    assert [each["offset"] for each in lost] == [number * 2 * PAGE_SIZE for number in range(BAD)]


def list_and_clear_many(client: Client, mount: QuickMount) -> None:
    """List many bad blocks, with statfs(2) meanwhile, then clear all by one range."""
    client.request("inject", ranges=_ranges())
    assert len(client.request("badblocks")["ranges"]) == BAD
    usage = os.statvfs(mount.path)
    assert usage.f_bfree - usage.f_bavail == BAD
    assert client.request("clear", ranges=[[GIB, GIB]])["bytes"] == BAD * 512
    usage = os.statvfs(mount.path)
    assert usage.f_bfree == usage.f_bavail
    assert client.request("status")["poisoned_sectors"] == 0


def clear_a_gib(client: Client, mount: QuickMount) -> None:
    """Clear 1 GiB of a file, poisoned in one piece."""
    path = _of_a_gib(mount)
    client.request("inject", ino=_ino(path), ranges=[[0, GIB]])
    assert client.request("clear", ino=_ino(path), ranges=[[0, GIB]])["bytes"] == GIB


def survey_at_most_cells(client: Client, mount: QuickMount) -> None:
    """A survey of as many cells as are allowed."""
    _of_many_extents(mount)
    client.request("inject", ranges=_ranges())
    found = client.request("survey", cells=1 << 16)
    assert len(found["cells"]) == 1 << 16
    assert sum(cell["bad"] for cell in found["cells"]) == BAD * 512


def map_many_extents(client: Client, mount: QuickMount) -> None:
    """The map of a file of many extents."""
    extents = client.request("map", ino=_ino(_of_many_extents(mount)))["extents"]
    assert [each["offset"] for each in extents] == [at * PAGE_SIZE for at in range(2 * MANY - 1)]
    assert [each["shared_by"] for each in extents] == [1, 0] * (MANY - 1) + [1]


def clone_many_extents(client: Client, mount: QuickMount) -> None:
    """A file of many extents cloned, cloned over another, and copied to the end of a third."""
    source = os.open(_of_many_extents(mount), os.O_RDWR)
    size = os.fstat(source).st_size
    expected = os.pread(source, size, 0)
    target = os.open(mount.path / "clone", os.O_RDWR | os.O_CREAT)
    clone_range(target, source)
    assert os.pread(target, size, 0) == expected
    clone_range(target, source)
    assert os.pread(target, size, 0) == expected
    copy = os.open(mount.path / "copy", os.O_RDWR | os.O_CREAT)
    reader = os.open(mount.path / "extents", os.O_RDONLY)
    os.close(source)
    os.close(target)
    assert os.copy_file_range(reader, copy, size, 0, 0) == size
    assert os.pread(copy, size, 0) == expected
    for fd in (reader, copy):
        os.close(fd)
    assert {
        each["shared_by"] for each in client.request("map", ino=_ino(mount.path / "copy"))["extents"]
    } == {0, 3}


def name_many_extents(client: Client, mount: QuickMount) -> None:
    """A file of many extents without a name gets a name."""
    fd = without_a_name(mount.path)
    _write_extents(fd, 2 * MANY)
    link_open_file(fd, mount.path / "named")
    os.fsync(fd)
    os.close(fd)
    assert (mount.path / "named").stat().st_blocks == 2 * MANY * 8


def overwrite_many_files(client: Client, mount: QuickMount) -> None:
    """One byte of each of many files overwritten."""
    paths = [mount.make_file(str(number), 1) for number in range(MANY)]
    os.sync()
    for path in paths:
        with path.open("r+b") as file:
            file.write(b"z")
    assert {path.read_bytes()[:2] for path in paths} == {b"zA"}


def unlink_many_extents(client: Client, mount: QuickMount) -> None:
    """A file of many extents deleted."""
    before = _free(mount)
    path = _of_many_extents(mount)
    assert _free(mount) < before - MANY
    path.unlink()
    assert _free(mount) >= before - 4096


def truncate_many_extents(client: Client, mount: QuickMount) -> None:
    """A file of many extents cut to the first."""
    path = _of_many_extents(mount)
    os.truncate(path, 1)
    assert path.read_bytes() == b"x"
    assert path.stat().st_blocks == 8


def open_many_extents_to_truncate(client: Client, mount: QuickMount) -> None:
    """A file of many extents opened with O_TRUNC."""
    path = _of_many_extents(mount)
    path.write_bytes(b"new")
    assert path.read_bytes() == b"new"


def punch_and_fill_many_extents(client: Client, mount: QuickMount) -> None:
    """A file of many holes filled, then made one hole but for both edges."""
    path = _of_many_extents(mount)
    size = path.stat().st_size
    fd = os.open(path, os.O_RDWR)
    fallocate(fd, 0, 0, size)
    assert path.stat().st_blocks == (2 * MANY - 1) * 8
    fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 1, size - 1)
    os.close(fd)
    assert path.read_bytes() == b"x" + bytes(size - 1)


def zero_a_gib(client: Client, mount: QuickMount) -> None:
    """Zero 1 GiB by fallocate(2)."""
    path = _of_a_gib(mount)
    with path.open("r+b") as file:
        file.write(b"y" * 10)
        file.flush()
        fallocate(file.fileno(), FALLOC_FL_ZERO_RANGE, 1, GIB - 1)
    assert path.stat().st_blocks == GIB // 512
    with path.open("rb") as file:
        assert file.read(10) == b"y" + bytes(9)


def allocate_and_give_back(client: Client, mount: QuickMount) -> None:
    """Allocate 1 GiB by fallocate(2), and delete a file of that length."""
    before = _free(mount)
    _of_a_gib(mount).unlink()
    assert _free(mount) >= before - 64


def allocate_more_than_there_is(client: Client, mount: QuickMount) -> None:
    """An fallocate(2) of more than the device has changes nothing."""
    path = _of_many_extents(mount)
    before, blocks = _free(mount), path.stat().st_blocks
    with path.open("r+b") as file, pytest.raises(OSError, match="No space left"):
        os.posix_fallocate(file.fileno(), 0, 8 * GIB)
    assert (_free(mount), path.stat().st_blocks) == (before, blocks)


def corrupt_silently(client: Client, mount: QuickMount) -> None:
    """Corrupt 250 MB of a file without poison."""
    path = _of_a_gib(mount)
    client.request("inject", ino=_ino(path), ranges=[[0, 250_000_000]], silent=True, seed=3)
    assert 0 not in path.open("rb").read(1 << 20)
    assert client.request("status")["badblocks"] == 0


def discard_a_mirror(client: Client, mount: QuickMount) -> None:
    """A mirror of a file of many extents made, and thrown away."""
    _of_many_extents(mount)
    before = client.request("status")["extents"]
    client.request("set", settings={"repair": "mirror"})
    assert client.request("status")["repair"]["space_bytes"] >= MANY * PAGE_SIZE
    client.request("set", settings={"repair": "none"})
    status = client.request("status")
    assert status["settings"]["repair"] == "none"
    assert status["extents"] <= before + 16


def make_many_names(client: Client, mount: QuickMount) -> None:
    """A directory of many names made, listed, and renamed."""
    (mount.path / "d").mkdir()
    for number in range(MANY):
        os.close(os.open(mount.path / "d" / str(number), os.O_CREAT | os.O_WRONLY))
    (mount.path / "d").rename(mount.path / "e")
    assert len(os.listdir(mount.path / "e")) == MANY
    fd = os.open(mount.path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def follow_from_the_first(client: Client, mount: QuickMount) -> None:
    """Receive all events so far, as a follower from the first event on."""
    client.request("inject", ranges=_ranges(), latent=True)
    with mount.client() as follower:
        found = 0
        for event in follower.events(after=0):
            found += isinstance(event, PoisonInjected)
            if found == BAD:
                break


CASES = [
    inject_many,
    inject_latent_and_scrub,
    inject_into_many_extents,
    list_and_clear_many,
    clear_a_gib,
    survey_at_most_cells,
    map_many_extents,
    clone_many_extents,
    name_many_extents,
    overwrite_many_files,
    unlink_many_extents,
    truncate_many_extents,
    open_many_extents_to_truncate,
    punch_and_fill_many_extents,
    zero_a_gib,
    allocate_and_give_back,
    allocate_more_than_there_is,
    corrupt_silently,
    discard_a_mirror,
    make_many_names,
    follow_from_the_first,
]


@pytest.mark.parametrize("request_at_its_limit", CASES, ids=lambda case: case.__name__)
def test_no_step_of_the_event_loop_does_too_much(
    measured: QuickMount,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    request_at_its_limit: Callable[[Client, QuickMount], None],
) -> None:
    reader = Reader(measured.make_file("small", 1))
    reader.start()
    try:
        with measured.client() as client:
            request_at_its_limit(client, measured)
            client.request("settle")
    finally:
        reader.over.set()
        reader.join()
    steps = json.loads((tmp_path / "steps").read_text())
    longest: dict[str, Any] = steps["longest"]
    record_property("longest wait of a reader, ms", round(reader.worst * 1000))
    record_property("longest step, ms of CPU", round(longest["cpu_ms"]))
    print(
        f"longest wait {reader.worst * 1000:.0f} ms; longest step {longest['cpu_ms']:.0f} ms of CPU, "
        f"{longest['wall_ms']:.0f} ms in all, in {longest['task']}; most of one step: {steps['most']}"
    )
    assert reader.reads
    assert reader.errors == []
    assert {unit: most for unit, most in steps["most"].items() if most > MOST[unit]} == {}
    assert measured.events("LoopStalled") == []
