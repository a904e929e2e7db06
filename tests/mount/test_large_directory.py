"""A directory of very many entries, while it changes."""

from __future__ import annotations

import os
import random
import threading
from collections import Counter

import pytest

from tests.support.quick import QuickMount

pytestmark = pytest.mark.mount


def test_a_directory_of_20000_entries(quick_mount: QuickMount) -> None:
    """A listing, while other processes add and remove names, has each name that was present all the time
    once.
    """
    directory = quick_mount.path / "d"
    directory.mkdir()
    for i in range(20_000):
        os.mknod(directory / f"file{i:05}")
    stop = threading.Event()

    def churn() -> None:
        rng, n = random.Random(1), 0
        while not stop.is_set():
            os.mknod(directory / f"extra{n}")
            (directory / f"extra{rng.randrange(n + 1)}").unlink(missing_ok=True)
            n += 1

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(3):
            listed = Counter(entry.name for entry in os.scandir(directory))
            assert max(listed.values()) == 1
            assert sum(name.startswith("file") for name in listed) == 20_000
    finally:
        stop.set()
        thread.join()
    quick_mount.remount()
    assert sum(name.startswith("file") for name in os.listdir(directory)) == 20_000
    for i in range(0, 20_000, 2):
        (directory / f"file{i:05}").unlink()
    assert sum(name.startswith("file") for name in os.listdir(directory)) == 10_000


def test_renamed_while_it_is_listed(quick_mount: QuickMount) -> None:
    """A removed name is not listed, and listing does not bring the name back."""
    directory = quick_mount.path / "renamed"
    directory.mkdir()
    for i in range(5_000):
        os.mknod(directory / f"file{i:05}")
    with os.scandir(directory) as listing:
        next(listing)
        for i in range(5_000):
            (directory / f"file{i:05}").rename(directory / f"now{i:05}")
        for _ in listing:
            pass
    assert not any((directory / f"file{i:05}").exists() for i in range(5_000))


def test_rewound_it_is_listed_anew(quick_mount: QuickMount) -> None:
    """os.listdir() of a descriptor ends with rewinddir(3)."""
    directory = quick_mount.path / "rewound"
    directory.mkdir()
    fd = os.open(directory, os.O_RDONLY)
    try:
        for i in range(3):
            assert len(os.listdir(fd)) == i
            os.mknod(directory / f"file{i}")
    finally:
        os.close(fd)
