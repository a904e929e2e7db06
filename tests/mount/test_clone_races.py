"""Stores through mappings while their file is cloned, or cloned over: the result is as if the clone happened
at one moment.

DAXEMU_RACE_SECONDS is the duration of the last tests in seconds.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.actor import Result
from tests.support.files import Files, content, is_clone
from tests.support.quick import QuickMount
from tests.support.requests import PATIENCE, until, waiting
from tests.support.scene import PAGE, Scene
from tests.support.syscalls import clone_range
from tests.support.zygote import Zygote

SECONDS = float(os.environ.get("DAXEMU_RACE_SECONDS", "4"))
WORD = 8

pytestmark = [pytest.mark.mount, pytest.mark.timeout(60 + 2 * SECONDS)]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root sees how many requests wait")

_libc = ctypes.CDLL(None)


def _clone(target: int, source: int) -> None:
    clone_range(target, source)


def _copy(target: int, source: int) -> None:
    size = os.fstat(source).st_size
    assert os.copy_file_range(source, target, size, 0, 0) == size


@pytest.fixture
def files(quick_mount: QuickMount) -> Iterator[Files]:
    with Files(quick_mount) as made:
        yield made


@as_root
@pytest.mark.parametrize("verb", [_clone, _copy])
def test_a_store_to_the_target_meanwhile(
    files: Files, tmp_path: Path, verb: Callable[[int, int], None]
) -> None:
    """A store at the moment of the clone is written back by another process: the old page must not
    come back.
    """
    mount = files.mount
    assert isinstance(mount, QuickMount)
    mount.umount()
    mount.mount("stop_at_remap", str(tmp_path))
    source, target = files.letters("f", 8), files.letters("g", 8, "M")
    with Scene(mount) as scene, ThreadPoolExecutor(3) as pool:
        mapper = scene.actor()
        for command in ("open 0 g rw", "mmap 0 0 0 8 shared", "tr 0 1", "tr 0 2", "tw 0 2 w"):
            mapper.cmd(command)
        cloning = pool.submit(verb, target, source)
        until((tmp_path / "stopped").exists)
        storing: Future[Result] = pool.submit(mapper.cmd, "tw 0 1 z")
        until(lambda: storing.done() or waiting(mount) >= 2)
        written = pool.submit(_libc.sync_file_range, target, ctypes.c_int64(0), ctypes.c_int64(0), 7)
        until(lambda: written.done() or waiting(mount) >= 2)
        (tmp_path / "go").touch()
        cloning.result(PATIENCE)
        assert not storing.result(PATIENCE).faulted
        written.result(PATIENCE)
    os.fsync(target)
    got, expected = content(target), content(source)
    assert got[PAGE + 1 :] == expected[PAGE + 1 :]
    assert got[:PAGE] == expected[:PAGE]
    # The kernel drops the target's pages, with this store, when a copy_file_range() is answered.
    assert got[PAGE : PAGE + 1] in (b"z", b"B" if verb is _copy else b"z")
    assert content(source) == b"".join(bytes([65 + i]) * PAGE for i in range(8))


def test_stores_to_the_source_meanwhile(files: Files, tmp_path: Path) -> None:
    """A clone that contains a store contains every earlier store."""
    mount = files.mount
    assert isinstance(mount, QuickMount)
    mount.umount()
    mount.mount("stop_in_write_back", str(tmp_path), "f")
    far = 511  # never in one folio with the first
    source, target = files.letters("f", far + 1), files.open("g")
    with mmap.mmap(source, 0) as view, ThreadPoolExecutor(1) as pool:
        view[far * PAGE] = view[far * PAGE]
        cloning = pool.submit(_clone, target, source)
        until((tmp_path / "stopped").exists)
        view[0] = ord("x")
        view[far * PAGE] = ord("y")
        (tmp_path / "go").touch()
        cloning.result(PATIENCE)
        view[PAGE] = ord("z")
        os.fsync(source)
    ends = 0, far * PAGE, PAGE
    assert [os.pread(source, 1, at) for at in ends] == [b"x", b"y", b"z"]
    assert [os.pread(target, 1, at) for at in ends] == [b"x", b"y", b"B"]


# -- everything at once


def store_for_ever(path: str, pages: int) -> None:
    """Store increasing numbers to each page of a mapping in turn, until the test ends: the first word of the
    first page is never less than the first word of the second page, and so on.
    """
    run, fd = Path(path + ".run"), os.open(path, os.O_RDWR)
    with mmap.mmap(fd, pages * PAGE) as view:
        number = int.from_bytes(view[:WORD], "little")
        while run.exists():
            for _ in range(100):
                number += 1
                for page in range(pages):
                    view[page * PAGE : page * PAGE + WORD] = number.to_bytes(WORD, "little")


def read_for_ever(path: str, pages: int) -> None:
    """Read pages of a mapping in turn, and the file by read(2), until the test ends."""
    run, fd = Path(path + ".run"), os.open(path, os.O_RDONLY)
    with mmap.mmap(fd, pages * PAGE, prot=mmap.PROT_READ) as view:
        while run.exists():
            for page in range(pages):
                assert len(view[page * PAGE : page * PAGE + 2]) == 2
                assert len(os.pread(fd, PAGE, page * PAGE)) == PAGE


def write_for_ever(path: str, page: int) -> None:
    """Write one page by write(2) until the test ends."""
    run, fd = Path(path + ".run"), os.open(path, os.O_RDWR)
    while run.exists():
        os.pwrite(fd, b"write(2)" * (PAGE // WORD), page * PAGE)


class _Busy:
    """Processes that use a file until the end of the block."""

    def __init__(self, zygote: Zygote, path: Path) -> None:
        self._zygote, self._path = zygote, path
        self._run = path.with_name(path.name + ".run")
        self._pids: list[int] = []

    def __enter__(self) -> _Busy:
        self._run.touch()
        return self

    def add(self, what: Callable[..., None], *arguments: object) -> None:
        name = f"{__name__}:{what.__name__}"
        self._pids.append(self._zygote.run(name, str(self._path), *arguments))

    def __exit__(self, *exc: object) -> None:
        self._run.unlink()
        for pid in self._pids:
            until(lambda pid=pid: not Path("/proc", str(pid)).exists())  # type: ignore[misc]


def _numbers(data: bytes) -> list[int]:
    return [int.from_bytes(data[at : at + WORD], "little") for at in range(0, len(data), PAGE)]


@pytest.mark.parametrize("verb", [_clone, _copy])
def test_the_source_is_stored_to_all_the_time(
    files: Files, zygote: Zygote, verb: Callable[[int, int], None]
) -> None:
    pages, clones = 5, 0
    different: set[int] = set()
    source = files.open("f")
    os.write(source, bytes(pages * PAGE))
    deadline = time.monotonic() + SECONDS
    with _Busy(zygote, files.mount.path / "f") as busy:
        busy.add(store_for_ever, pages)
        while time.monotonic() < deadline or len(different) < 2:
            target = files.open("g")
            verb(target, source)
            got = _numbers(content(target))
            # At one moment of the writer's round, some pages are one number ahead.
            assert got == sorted(got, reverse=True)
            assert got[0] - got[-1] <= 1
            assert _numbers(content(target)) == got, "the clone changed later"
            different.add(got[0])
            clones += 1
            files.close("g")
    print(f"{clones} clones, {len(different)} states")
    os.fsync(source)
    assert _numbers(content(source))[0] >= max(different)


@pytest.mark.parametrize("verb", [_clone, _copy])
def test_the_target_is_used_all_the_time(
    files: Files, zygote: Zygote, verb: Callable[[int, int], None]
) -> None:
    """After the clone the target has the cloned bytes; of its old content only whole stores remain."""
    pages, written, rounds = 8, 6, 0
    sources = [files.letters(name, pages, first) for name, first in (("one", "A"), ("two", "P"))]
    target = files.letters("g", pages, "A")
    deadline = time.monotonic() + SECONDS
    with _Busy(zygote, files.mount.path / "g") as busy:
        busy.add(store_for_ever, 3)
        busy.add(read_for_ever, pages)
        busy.add(write_for_ever, written)
        while time.monotonic() < deadline:
            source = sources[rounds % 2]
            verb(target, source)
            expected = content(source)
            _libc.sync_file_range(target, ctypes.c_int64(0), ctypes.c_int64(0), 7)
            got = content(target)
            for page in range(pages):
                old = got[page * PAGE + WORD : page * PAGE + PAGE]
                new = expected[page * PAGE + WORD : page * PAGE + PAGE]
                if page == written:
                    assert old in (new, (b"write(2)" * (PAGE // WORD))[WORD:])
                else:
                    assert old == new, f"page {page} after {rounds} rounds"
            rounds += 1
    print(f"{rounds} rounds")
    verb(target, sources[0])
    assert content(target) == content(sources[0])
    assert is_clone(target, sources[0])
