"""Listings resumed by a cookie on another handle, as NFS servers do."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.support.quick import QuickMount
from tests.support.syscalls import page_of

pytestmark = pytest.mark.mount

NAMES = {f"file{i:03}" for i in range(200)}


@pytest.fixture
def directory(quick_mount: QuickMount) -> Path:
    made = quick_mount.path / "d"
    made.mkdir()
    for name in NAMES:
        os.mknod(made / name)
    return made


def test_each_page_on_a_handle_of_its_own(directory: Path) -> None:
    listed: list[str] = []
    cookie = 0
    while page := page_of(directory, cookie, 7):
        listed += [name for name, _ in page]
        cookie = page[-1][1]
    assert listed[:2] == [".", ".."]
    assert sorted(listed[2:]) == sorted(NAMES)
    assert set(os.listdir(directory)) == NAMES


def test_changes_between_pages(directory: Path) -> None:
    """A name present all the time is listed once."""
    rng = random.Random(11)
    stay = set(rng.sample(sorted(NAMES), 100))
    go = sorted(NAMES - stay)
    listed: list[str] = []
    cookie = made = 0
    while page := page_of(directory, cookie, 5):
        listed += [name for name, _ in page]
        cookie = page[-1][1]
        for _ in range(3):
            if go:
                (directory / go.pop()).unlink()
            os.mknod(directory / f"new{made}")
            made += 1
    assert len(listed) == len(set(listed))
    assert stay <= set(listed)


def test_cookies_outlive_the_mount(quick_mount: QuickMount, directory: Path) -> None:
    whole = page_of(directory, 0, 1000)
    quick_mount.remount()
    for place in (0, 1, 2, 50, len(whole) - 1):
        assert page_of(directory, whole[place][1], 1000) == whole[place + 1 :]
