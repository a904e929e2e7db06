"""Kind of each test: unit, mount or slow. ``make unit`` runs the unit tests.

- *mount*: the test mounts a device. :func:`mark` marks every test with a fixture of MOUNT_FIXTURES; a test
  with another way of mounting carries the marker itself. :func:`require` fails a mounting test without the
  marker.
- *slow*: the test builds packages, starts a cluster, damages thousands of images or is a benchmark.
  :func:`mark` marks every test with a fixture of SLOW_FIXTURES; the others carry the marker.
- *unit*: neither.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

MOUNT_FIXTURES = frozenset({"dax_mount", "quick_mount", "zygote"})
"""Fixtures that mount. Fixtures made of these (``scene``, ``early``) count too."""
SLOW_FIXTURES = frozenset({"archives", "cluster"})
"""Fixtures that build packages or start a cluster."""

_running: list[pytest.Item] = []


def mark(item: pytest.Item) -> None:
    """Mark a test by its fixtures, direct or through other fixtures."""
    used = set(getattr(item, "fixturenames", ()))
    if used & MOUNT_FIXTURES:
        item.add_marker("mount")
    if used & SLOW_FIXTURES or item.get_closest_marker("bench"):
        item.add_marker("slow")


def kind(item: pytest.Item) -> str:
    """Return "slow", "mount" or "unit". A test with both markers is slow."""
    return next((name for name in ("slow", "mount") if item.get_closest_marker(name)), "unit")


def count(items: Iterable[pytest.Item]) -> dict[str, int]:
    """Return the number of tests of each kind."""
    found = Counter(map(kind, items))
    return {name: found[name] for name in ("unit", "mount", "slow")}


def sort(items: list[pytest.Item]) -> None:
    """Sort files of tests by the longest kind of test: slow, mount, unit. The order within a file stays.

    The last file of a run has one processor alone: that must be a short file.
    """
    order = ("slow", "mount", "unit")
    of_file: dict[Path, int] = {}
    for item in items:
        of_file[item.path] = min(of_file.get(item.path, len(order)), order.index(kind(item)))
    items.sort(key=lambda item: of_file[item.path])


def begin(item: pytest.Item) -> None:
    """Note the test running from now on in this process."""
    _running[:] = [item]


def require(marker: str) -> None:
    """Fail the running test if the test is without ``marker``. Outside of a pytest run nothing happens.

    Raises AssertionError.
    """
    for item in _running:
        assert item.get_closest_marker(marker), f"{item.nodeid} needs @pytest.mark.{marker}"
