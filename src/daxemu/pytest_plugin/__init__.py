"""Pytest plugin (entry point ``daxemu``): each test gets a mount of its own, with memory failures on demand.

Fixtures  ``dax_device``, ``dax_mount``, ``inject``, ``dax_events``
Markers   ``dax``, ``dax_size``, ``dax_policy``, ``dax_repair``, ``dax_mkfs``, ``dax_timeout``

A failed test shows the events of its mount and the damaged files. The name of a device contains the process
id, so workers of pytest-xdist use separate devices. A mount ends with the process of its test run, also if
the process is killed. No module of daxemu is imported before a test requests a fixture.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    import os

    from daxemu.failure_kind import FailureKind
    from daxemu.protocol import Injected
    from daxemu.pytest_plugin.events import Events
    from daxemu.pytest_plugin.mount import DaxMount
    from daxemu.pytest_plugin.watchdog import HangWatchdog

DEFAULT_SIZE = "1G"
DEFAULT_TIMEOUT = 60.0
SHOWN_EVENTS = 100
_MARKERS = (
    "dax(direct=False): the mode of the mount; direct=True is daxemu mount --direct, which needs root",
    'dax_size(size): size of the device, such as "6T"',
    'dax_policy(**settings): settings of the mount, as of daxemu set: early_kill=1, lost_store="eio"',
    'dax_repair(strategy): repair strategy, as of daxemu mount --repair: "NAME" or "NAME:key=value,..."',
    "dax_mkfs(*options): more options of daxemu mkfs: altmap=True, struct_pages=False, base_pfn=...",
    "dax_timeout(seconds): limit of the test; a test that takes longer counts as hung, and is ended",
)


_WATCHDOG: pytest.StashKey[HangWatchdog] = pytest.StashKey()


class InjectFixture(Protocol):
    """Type of the fixture ``inject``."""

    def __call__(
        self,
        file: str | os.PathLike[str],
        offset: int = 0,
        length: int | None = None,
        *,
        latent: bool = False,
        kind: str | FailureKind = "poison",
        seed: int = 0,
    ) -> Injected:
        """Poison a range of ``file`` or, for the mountpoint, of the device. ``offset`` and ``length`` are
        bytes; without ``length``, one page. ``kind``: poison, latent (as ``latent=True``), or silent
        (``seed`` selects the new bytes). Raises InvalidArgument for another kind.
        """


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the setting ``dax_timeout``: the limit of each test on a mount."""
    parser.addini(
        "dax_timeout", "seconds that a test with dax_mount may take (dax_timeout marker)", default=""
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers."""
    for marker in _MARKERS:
        config.addinivalue_line("markers", marker)


@pytest.fixture
def dax_device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Fresh device, not mounted. The markers ``dax_size`` and ``dax_mkfs`` set its size and options. The
    device is removed after the test.
    """
    from daxemu.pytest_plugin.mount import fresh_device

    size = _argument(request.node, "dax_size", DEFAULT_SIZE)
    marker = request.node.get_closest_marker("dax_mkfs")
    with fresh_device(size, tmp_path, **(marker.kwargs if marker else {})) as device:
        yield device


@pytest.fixture
def dax_mount(request: pytest.FixtureRequest, dax_device: Path, tmp_path: Path) -> Iterator[DaxMount]:
    """Fresh mount (``daxemu.pytest_plugin.mount.DaxMount``): ``dax_mount / "file"`` is a path on the
    mount.
    """
    from daxemu.pytest_plugin.mount import DaxMount

    mountpoint = tmp_path / "dax"
    mountpoint.mkdir()
    policy = request.node.get_closest_marker("dax_policy")
    settings = {name: str(value) for name, value in (policy.kwargs if policy else {}).items()}
    repair = _argument(request.node, "dax_repair", None)
    mount = DaxMount(dax_device, mountpoint, settings, repair, is_direct=_is_direct(request.node))
    try:
        mount.mount()
        yield mount
    finally:
        mount.end()


@pytest.fixture
def inject(dax_mount: DaxMount) -> InjectFixture:
    """Return ``inject(file, offset, length, latent=False, kind="poison")``, which makes a range fail."""
    return dax_mount.inject


@pytest.fixture
def dax_events(dax_mount: DaxMount) -> Events:
    """Events of the mount. Each call returns the list of the events so far; ``wait`` waits for new events."""
    from daxemu.pytest_plugin.events import Events

    return Events(dax_mount)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Run a test on a mount under the watchdog."""
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
    """Add the events and the damaged files of the mount to the report of a failure."""
    report = yield
    mount = _mount_of(item)
    if mount is not None and report.failed and report.when != "teardown":
        report.sections += mount.story(SHOWN_EVENTS)
    return report


def _mount_of(item: pytest.Item) -> DaxMount | None:
    """Return the mount of a test; None for a test without a mount of the plugin."""
    found = getattr(item, "funcargs", {}).get("dax_mount")
    if found is None:
        return None
    from daxemu.pytest_plugin.mount import DaxMount

    return found if isinstance(found, DaxMount) else None


def _is_direct(node: Any) -> bool:
    marker = node.get_closest_marker("dax")
    if marker is None:
        return False
    if marker.args or set(marker.kwargs) - {"direct"}:
        raise pytest.UsageError("dax takes the keyword direct: dax(direct=True)")
    return bool(marker.kwargs.get("direct", False))


def _argument(node: Any, name: str, default: Any) -> Any:
    marker = node.get_closest_marker(name)
    if marker is None:
        return default
    if len(marker.args) != 1:
        raise pytest.UsageError(f"{name} takes one argument: {name}({default or '...'})")
    return marker.args[0]


def _watchdog(config: pytest.Config) -> HangWatchdog:
    from daxemu.pytest_plugin.watchdog import HangWatchdog

    if _WATCHDOG not in config.stash:
        config.stash[_WATCHDOG] = HangWatchdog(config)
        config.add_cleanup(config.stash[_WATCHDOG].close)
    return config.stash[_WATCHDOG]
