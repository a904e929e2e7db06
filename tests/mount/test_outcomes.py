"""Each outcome of device memory on a real mount: answer, log line, counters, DEVICE/sysfs (docs/fidelity.md,
"Page states and outcomes").
"""

from __future__ import annotations

from pathlib import Path

import pytest

from daxemu.events import Outcome, PageType
from tests.support.mount import DaxMount
from tests.support.scene import PAGE, Scene, signals_of

pytestmark = pytest.mark.mount

BAD = 3
FREE = (1 << 30) - 64 * PAGE


def counters(mount: DaxMount) -> dict[str, int]:
    """Return the counters that grew, as ``status`` and as DEVICE/sysfs show them."""
    shown = {name: n for name, n in mount.json("status", mount.path)["counters"].items() if n}
    sysfs = mount.device / "sysfs" / "memory_failure"
    files = {path.name: int(path.read_text()) for path in sysfs.iterdir()}
    assert set(files) == {"total", *(outcome.value.lower() for outcome in Outcome)}
    assert files.pop("total") == sum(shown.values())
    assert {name: n for name, n in files.items() if n} == shown
    return shown


def outcome(mount: DaxMount, name: str, offset: int) -> str:
    """Return the outcome of a failure of one page."""
    (result,) = mount.inject(name, (offset, PAGE))["ranges"]
    return str(result["outcome"])


def recovery_actions(mount: DaxMount) -> list[str]:
    """Return the log line of each failure."""
    lines = mount.run("log", mount.path, "--dmesg").splitlines()
    return [line.partition("recovery action for ")[2] for line in lines if "recovery action" in line]


def test_recovered(scene: Scene) -> None:
    """A page of a file, the same once more (poisoned already), and a free one."""
    p0 = scene.mapper(touch=[BAD], before=["mcekill early"])
    assert outcome(scene.mount, "f", BAD * PAGE) == "Recovered"
    assert len(signals_of(p0)) == 1
    assert outcome(scene.mount, "f", BAD * PAGE) == "Recovered"
    assert signals_of(p0) == [], "it has the page no longer"
    assert outcome(scene.mount, "", FREE) == "Recovered"
    assert counters(scene.mount) == {"recovered": 3}
    assert recovery_actions(scene.mount) == ["dax page: Recovered"] * 3
    assert sum(count for _, count in scene.badblocks()) == 2 * 8


def test_failed(scene: Scene) -> None:
    """Poison in the filesystem's own records: Failed, also where the range holds a file."""
    scene.mount.sound = False
    assert outcome(scene.mount, "f", BAD * PAGE) == "Recovered"
    assert outcome(scene.mount, "", 0) == "Failed"
    assert counters(scene.mount) == {"recovered": 1, "failed": 1}
    assert recovery_actions(scene.mount) == ["dax page: Recovered", "dax page: Failed"]


@pytest.mark.parametrize("dax_mount", ["64M --no-struct-pages"], indirect=True)
def test_without_struct_pages_only_the_log_has_the_outcome(scene: Scene) -> None:
    assert outcome(scene.mount, "f", BAD * PAGE) == "Recovered"
    assert outcome(scene.mount, "f", BAD * PAGE) == "Recovered"
    assert counters(scene.mount) == {}
    assert recovery_actions(scene.mount) == ["non struct page pfn: Recovered"] * 2


def test_removal_is_no_failure_of_pages(scene: Scene) -> None:
    scene.mapper(touch=[BAD])
    assert scene.mount.json("remove", scene.mount.path)["told"] == 1
    assert counters(scene.mount) == {}
    assert recovery_actions(scene.mount) == []


def test_the_table_names_them_all() -> None:
    doc = Path(__file__).parents[2] / "docs" / "fidelity.md"
    table = doc.read_text().partition("## Page states and outcomes")[2]
    assert [each.value for each in (*PageType, *Outcome) if each.value not in table] == []
