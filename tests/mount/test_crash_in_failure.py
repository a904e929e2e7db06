"""State after a SIGKILL of the supervisor in the midst of a failure, as documented in docs/concurrency.md."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.quick import QuickMount
from tests.support.scene import PAGE, Scene, present, signals_of

pytestmark = pytest.mark.mount


@pytest.mark.parametrize(
    ("when", "signals"), [("before", []), ("after", ["BUS_ADRERR"])], ids=["collected", "revoked"]
)
def test_a_crash_leaves_poison_and_no_signal(
    quick_mount: QuickMount, tmp_path: Path, when: str, signals: list[str]
) -> None:
    """Before revoke the page stays mapped with the old bytes. The next mount knows the poison."""
    quick_mount.umount()
    quick_mount.mount("stop_in_failure", str(tmp_path), when)
    quick_mount.make_file("f", 1)
    with Scene(quick_mount) as scene, ThreadPoolExecutor(1) as pool:
        scene.set(early_kill=1)
        p0 = scene.mapper("p0", touch=[0], pages=1)
        with (quick_mount.path / "f").open("rb") as file:
            os.fsync(file.fileno())
        injecting = pool.submit(quick_mount.inject, "f", (0, PAGE))
        _wait_for(tmp_path / "stopped")
        assert present(p0, 0, 0) is (when == "before")
        quick_mount.kill()
        assert isinstance(injecting.exception(30), AssertionError)
        assert signals_of(p0) == []
        assert p0.cmd("tr 0 0").faulted is bool(signals)
        assert [signal["code"] for signal in signals_of(p0)] == signals
    quick_mount.mount()
    with quick_mount.client() as client:
        assert client.request("badblocks")["sectors"] == PAGE // 512
        assert [lost["path"] for lost in client.request("damaged")["files"]] == ["/f"]
        assert client.request("status")["counters"]["recovered"] == 0


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.005)
