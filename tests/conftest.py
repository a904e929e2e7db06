"""Fixtures that every test may use, and the kind of each test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support import kinds
from tests.support.core import core as core
from tests.support.mount import DaxMount, dax_mount_at

# A busy machine is no failure: tests assert nothing about time.
# Each run has the same examples; `make soak` has others.
settings.register_profile(
    "daxemu",
    deadline=None,
    derandomize="DAXEMU_MODEL_RANDOM" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("daxemu")

COUNTS = pytest.StashKey[dict[str, int]]()
"""Number of collected tests of each kind. Under pytest-xdist a worker sends the numbers to the controller."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-bench", action="store_true", help="run the benchmarks too")


@pytest.hookimpl(tryfirst=True)  # before -m deselects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        kinds.mark(item)
        if item.get_closest_marker("bench") and not config.getoption("--run-bench"):
            item.add_marker(pytest.mark.skip(reason="a benchmark: make bench"))
        if item.get_closest_marker("mount") and not os.access("/dev/fuse", os.R_OK | os.W_OK):
            item.add_marker(pytest.mark.skip(reason="no /dev/fuse here, or no right to use it"))
    kinds.sort(items)
    counts = config.stash[COUNTS] = kinds.count(items)
    if (output := getattr(config, "workeroutput", None)) is not None:
        output["kinds"] = counts


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    if counts := getattr(node, "workeroutput", {}).get("kinds"):  # a worker that crashed has none
        node.config.stash[COUNTS] = counts


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    if counts := config.stash.get(COUNTS, None):
        found = ", ".join(f"{number} {kind}" for kind, number in counts.items())
        terminalreporter.write_line(f"collected: {found}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    kinds.begin(item)


@pytest.fixture
def dax_mount(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[DaxMount]:
    """A fresh mount; ``@pytest.mark.parametrize("dax_mount", ["6T --altmap"], indirect=True)`` for other
    options of mkfs.
    """
    with dax_mount_at(tmp_path, *getattr(request, "param", "1G").split()) as made:
        yield made
