"""The pytest plugin (entry point ``daxemu``): tests on a mount of their own, whose memory goes bad on demand.

Fixtures  ``dax_device``, ``dax_mount``, ``inject``, ``dax_events``
Markers   ``dax_size``, ``dax_policy``, ``dax_repair``, ``dax_mkfs``, ``dax_timeout``

A failed test shows the events of its mount and the damaged files. Devices are named by process, so workers of
pytest-xdist do not meet. A mount ends with the process that made it, however that ends. Nothing is imported
before a test asks for a fixture.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    import os

    from daxemu.protocol import Injected
    from daxemu.pytest_plugin.events import Events
    from daxemu.pytest_plugin.mount import DaxMount
    from daxemu.pytest_plugin.watchdog import HangGuard

DEFAULT_SIZE = "1G"
DEFAULT_TIMEOUT = 60.0
SHOWN_EVENTS = 100
_MARKERS = (
    'dax_size(size): size of the device, such as "6T"',
    'dax_policy(**settings): settings of the mount, as of daxemu set: early_kill=1, lost_store="eio"',
    'dax_repair(strategy): repair strategy, as of daxemu mount --repair: "NAME" or "NAME:key=value,..."',
    "dax_mkfs(*options): more options of daxemu mkfs: altmap=True, struct_pages=False, base_pfn=...",
    "dax_timeout(seconds): how long the test may take; after that it hangs, and is ended",
)


_WATCHDOG: pytest.StashKey[HangGuard] = pytest.StashKey()


class InjectFixture(Protocol):
    """What the fixture ``inject`` is."""

    def __call__(
        self,
        file: str | os.PathLike[str],
        offset: int = 0,
        length: int | None = None,
        *,
        latent: bool = False,
    ) -> Injected:
        """Poison a range of ``file``, or given the mountpoint of the device; the page at ``offset`` if no
        ``length`` is given.
        """


def pytest_addoption(parser: pytest.Parser) -> None:
    """The limit for all tests on a mount."""
    parser.addini(
        "dax_timeout", "seconds that a test with dax_mount may take (dax_timeout marker)", default=""
    )


def pytest_configure(config: pytest.Config) -> None:
    """Announce the markers."""
    for marker in _MARKERS:
        config.addinivalue_line("markers", marker)


@pytest.fixture
def dax_device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A fresh device, not mounted; ``dax_size`` and ``dax_mkfs`` say of what kind. Gone after the test."""
    from daxemu.pytest_plugin.mount import fresh_device

    size = _argument(request.node, "dax_size", DEFAULT_SIZE)
    marker = request.node.get_closest_marker("dax_mkfs")
    with fresh_device(size, tmp_path, **(marker.kwargs if marker else {})) as device:
        yield device


@pytest.fixture
def dax_mount(request: pytest.FixtureRequest, dax_device: Path, tmp_path: Path) -> Iterator[DaxMount]:
    """A fresh mount (``daxemu.pytest_plugin.mount.DaxMount``): ``dax_mount / "file"`` is a path on it."""
    from daxemu.pytest_plugin.mount import DaxMount

    mountpoint = tmp_path / "dax"
    mountpoint.mkdir()
    policy = request.node.get_closest_marker("dax_policy")
    settings = {name: str(value) for name, value in (policy.kwargs if policy else {}).items()}
    mount = DaxMount(dax_device, mountpoint, settings, _argument(request.node, "dax_repair", None))
    try:
        mount.mount()
        yield mount
    finally:
        mount.end()


@pytest.fixture
def inject(dax_mount: DaxMount) -> InjectFixture:
    """``inject(file, offset, length, latent=False)``: poison."""
    return dax_mount.inject


@pytest.fixture
def dax_events(dax_mount: DaxMount) -> Events:
    """What happened on the mount so far (a list each time it is called), and ``wait`` for what is to come."""
    from daxemu.pytest_plugin.events import Events

    return Events(dax_mount)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Have a test on a mount watched."""
    mount = _mount_of(item)
    if mount is None:
        return (yield)
    limit = _argument(item, "dax_timeout", item.config.getini("dax_timeout") or DEFAULT_TIMEOUT)
    with _watchdog(item.config).watch(mount, float(limit)):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add what the mount has to say to the report of a failure."""
    report = yield
    mount = _mount_of(item)
    if mount is not None and report.failed and report.when != "teardown":
        report.sections += mount.story(SHOWN_EVENTS)
    return report


def _mount_of(item: pytest.Item) -> DaxMount | None:
    """The mount that a test has, if it is this plugin's."""
    found = getattr(item, "funcargs", {}).get("dax_mount")
    if found is None:
        return None
    from daxemu.pytest_plugin.mount import DaxMount

    return found if isinstance(found, DaxMount) else None


def _argument(node: Any, name: str, default: Any) -> Any:
    marker = node.get_closest_marker(name)
    if marker is None:
        return default
    if len(marker.args) != 1:
        raise pytest.UsageError(f"{name} takes one argument: {name}({default or '...'})")
    return marker.args[0]


def _watchdog(config: pytest.Config) -> HangGuard:
    from daxemu.pytest_plugin.watchdog import HangGuard

    if _WATCHDOG not in config.stash:
        config.stash[_WATCHDOG] = HangGuard(config)
        config.add_cleanup(config.stash[_WATCHDOG].close)
    return config.stash[_WATCHDOG]
