"""Times of files that are stored to through mappings."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from tests.support.quick import QuickMount
from tests.support.scene import PAGE

pytestmark = pytest.mark.mount

THEN = 1_000_000_000 * 10**9


@pytest.fixture
def file(quick_mount: QuickMount) -> Path:
    made = quick_mount.path / "f"
    made.write_bytes(bytes(4 * PAGE))
    return made


@pytest.mark.parametrize("way", ["path", "descriptor", "other name"])
def test_a_time_that_was_set_stays(file: Path, way: str) -> None:
    """As cp -p, rsync -t and tar set times over a mapped file: earlier stores do not make the file newer."""
    target: Path | int = file
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as view:
        if way == "descriptor":
            target = opened.fileno()
        elif way == "other name":
            target = file.with_name("g")
            os.link(file, target)
        view[0] = view[2 * PAGE] = ord("x")
        os.utime(target, ns=(THEN, THEN))
        view.flush()
        os.fsync(opened.fileno())
        assert file.stat().st_mtime_ns == THEN
    assert file.stat().st_mtime_ns == THEN
    assert file.read_bytes()[:1] == b"x"


def test_a_store_after_it_is_newer(file: Path) -> None:
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as view:
        view[0] = ord("x")
        os.utime(file, ns=(THEN, THEN))
        view[0] = ord("y")
        view.flush()
        assert file.stat().st_mtime_ns > THEN


def test_after_the_mapping_is_gone(file: Path) -> None:
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as view:
        view[0] = ord("x")
    os.utime(file, ns=(THEN, THEN))
    top = os.open(file.parent, os.O_RDONLY)
    os.fsync(top)
    os.close(top)
    assert file.stat().st_mtime_ns == THEN
