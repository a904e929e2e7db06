"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.core import core as core
from tests.support.mount import DaxMount, dax_mount_at


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-bench", action="store_true", help="run the benchmarks too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("bench") and not config.getoption("--run-bench"):
            item.add_marker(pytest.mark.skip(reason="a benchmark: make bench"))
        if item.get_closest_marker("mount") and not os.access("/dev/fuse", os.R_OK | os.W_OK):
            item.add_marker(pytest.mark.skip(reason="no /dev/fuse here, or no right to use it"))


@pytest.fixture
def dax_mount(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[DaxMount]:
    """A fresh mount; ``@pytest.mark.parametrize("dax_mount", ["6T --altmap"], indirect=True)`` for what else
    mkfs can make.
    """
    with dax_mount_at(tmp_path, *getattr(request, "param", "1G").split()) as made:
        yield made
