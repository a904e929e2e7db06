"""DEVICE/sysfs: counters and badblocks in the format of the kernel."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from daxemu.events import Outcome
from daxemu.mm.memory_failure import MemoryFailures
from daxemu.pmem.badblocks import Badblocks
from daxemu.pmem.device_dir import DeviceDir
from daxemu.pmem.sysfs import Sysfs
from daxemu.private_path import PrivatePath
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE
from tests.support.core import Core


@dataclass
class OneFile:
    """A holder with one file, the owner of every page."""

    mm: MemoryFailures
    base_pfn: int

    def before_poison(self) -> None:
        """No grant depends on the health of the media."""

    def notify_failure(self, offset: int, length: int, flags: int) -> None:
        index, count = offset // PAGE_SIZE, length // PAGE_SIZE
        self.mm.mf_dax_kill_procs(7, index, count, self.base_pfn + index, flags)


@pytest.fixture
def sysfs(tmp_path: Path) -> Iterator[Sysfs]:
    made = Sysfs(PrivatePath.at(tmp_path) / "sysfs")
    yield made
    made.close()


def test_counters_begin_at_zero_and_badblocks_empty(sysfs: Sysfs, tmp_path: Path) -> None:
    shown = {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    assert shown.pop("sysfs/badblocks") == ""
    assert set(shown.values()) == {"0\n"}
    names = {Path(name).name for name in shown}
    assert names == {"total", "ignored", "failed", "delayed", "recovered"}


def test_counters_are_one_number_a_file(sysfs: Sysfs, tmp_path: Path) -> None:
    sysfs.show_counters({Outcome.RECOVERED: 12, Outcome.FAILED: 3})
    read = {p.name: p.read_text() for p in (tmp_path / "sysfs" / "memory_failure").iterdir()}
    assert read == {
        "total": "15\n",
        "recovered": "12\n",
        "failed": "3\n",
        "ignored": "0\n",
        "delayed": "0\n",
    }


def test_badblocks_is_at_most_a_page_of_whole_lines(sysfs: Sysfs, tmp_path: Path) -> None:
    badblocks = Badblocks()
    badblocks.on_change.register(lambda: sysfs.show_badblocks(badblocks))
    for sector in range(0, 200_000, 100):
        badblocks.set(sector, 2)
    text = (tmp_path / "sysfs" / "badblocks").read_text()
    assert 4080 < len(text) <= 4096
    assert badblocks.sysfs_text().startswith(text)
    assert text.endswith("\n")
    badblocks.clear(100, 200_000)
    assert (tmp_path / "sysfs" / "badblocks").read_text() == "0 2\n"


def test_a_full_host_filesystem_stops_no_failure(sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    sysfs.show_counters({Outcome.FAILED: 3})


def test_sysfs_follows_the_device_and_is_created_anew_at_the_next_mount(core: Core) -> None:
    core.without_filesystem()
    core.pmem.make_struct_pages()
    shown = core.pmem.show_in_sysfs()
    mm = MemoryFailures(lambda event: None, on_count=shown.show_counters)
    core.pmem.attach(mm)
    counters = core.path / "sysfs" / "memory_failure"
    pfn = core.pmem.pfn_of(0)
    assert core.pmem.pgmap is not None
    memmap = core.pmem.pgmap.memmap
    assert memmap is not None
    # The device has no holder: mf_generic_kill_procs() finds no mapping, and marks no page.
    mm.action_result(mm.memory_failure(pfn, 3, 0), 0)
    assert [(counters / name).read_text() for name in ("total", "failed")] == ["1\n", "1\n"]
    assert not memmap.page_hwpoison(pfn)
    holder = OneFile(mm, pfn)
    core.pmem.dax.hold(holder)
    mm.action_result(mm.memory_failure(pfn, 3, 0), 0)
    core.pmem.dax.release(holder)
    assert [(counters / name).read_text() for name in ("total", "recovered")] == ["2\n", "1\n"]
    assert [memmap.page_hwpoison(pfn + page) for page in range(4)] == [True, True, True, False]
    # Two of the three pages are clear. The third page still has a poisoned sector.
    core.pmem.dax.add_poison(Range(0, 3 * 4096))
    core.pmem.dax.clear_poison(0, 2 * 4096 + 512)
    assert [memmap.page_hwpoison(pfn + page) for page in range(4)] == [False, False, True, False]
    core.close()
    assert not (core.path / "struct_page").exists()
    assert (core.path / "sysfs").exists()
    DeviceDir.load(core.path).wipe()
    assert not core.path.exists()
