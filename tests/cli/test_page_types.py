"""daxemu page-types: from outside, while the machine runs."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
from click.testing import CliRunner

from daxemu.cli.main import main
from daxemu.cli.page_types import kpageflags
from daxemu.mm.memmap import Memmap
from daxemu.mm.memmap_arrays import PAGES_PER_SECTION
from daxemu.mm.pfn_kinds import PfnKind
from daxemu.ranges import Range
from tests.support.core import Core
from tests.support.mount import DaxMount, daxemu

S = PAGES_PER_SECTION


def counts(device: Path) -> dict[tuple[str, tuple[str, ...]], int]:
    """Pages by kind and names of flags."""
    found = json.loads(daxemu("page-types", device, "--json"))
    assert found["pages"] == sum(each["pages"] for each in found["types"])
    return {(each["kind"], tuple(each["names"])): each["pages"] for each in found["types"]}


@pytest.mark.parametrize("kind", list(PfnKind))
def test_only_a_struct_page_that_may_be_looked_at_has_flags(kind: PfnKind) -> None:
    if kind is PfnKind.ZONE_DEVICE:
        assert kpageflags(kind, True) == 1 << 32 | 1 << 19
        assert kpageflags(kind, False) == 1 << 32
    else:
        assert kpageflags(kind, False) == kpageflags(kind, True) == 1 << 20


def test_every_kind_of_pfn(core: Core) -> None:
    memmap = Memmap.create(core.device.root / "struct_page", Range(0, 6 * S))
    memmap.add_offline(Range(0, S))
    memmap.add_pages(Range(2 * S + 10, 5 * S - 10), altmap_pages=20)
    memmap.memmap_init_zone_device(Range(0, 4 * S))
    memmap.set_hwpoison(Range(3 * S, 3 * S + 5))
    assert counts(core.path) == {
        ("hole", ("nopage",)): 2 * S,
        ("offline", ("nopage",)): S,
        ("partial section", ("nopage",)): 20,
        ("altmap", ("nopage",)): 20,
        ("not initialised", ("nopage",)): S - 10,
        ("zone device", ("reserved",)): 2 * S - 30 - 5,
        ("zone device", ("hwpoison", "reserved")): 5,
    }
    shown = CliRunner().invoke(main, ["page-types", str(core.path)]).output
    assert "X_r" in shown
    assert shown.splitlines()[-1].split()[:2] == ["total", str(6 * S)]
    listed = CliRunner().invoke(main, ["page-types", "-l", str(core.path)]).output
    assert f"{3 * S:#x}\t0x5\tX_r\tzone device" in listed
    memmap.discard()


def test_what_is_not_mounted_has_no_struct_pages(core: Core, tmp_path: Path) -> None:
    assert "not mounted" in daxemu("page-types", core.path, status=3)
    assert "not a daxemu device" in daxemu("page-types", tmp_path, status=3)


@pytest.mark.mount
@pytest.mark.parametrize("dax_mount", ["6T"], indirect=True)
def test_6_tib_while_they_are_in_use(dax_mount: DaxMount) -> None:
    device = dax_mount.device
    dax_mount.make_file("f", 4)
    all_of_it = counts(device)["zone device", ("reserved",)]
    assert all_of_it == (6 << 40) >> 12
    dax_mount.inject("f", (4096, 8192))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert counts(device)["zone device", ("hwpoison", "reserved")] == 2
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 5
    sysfs = device / "sysfs"
    assert {p.name: p.read_text() for p in (sysfs / "memory_failure").iterdir()} == {
        "total": "1\n",
        "ignored": "0\n",
        "failed": "0\n",
        "delayed": "0\n",
        "recovered": "1\n",
    }
    assert (sysfs / "badblocks").read_text().split()[1:] == ["16"]
    dax_mount.run("clear", dax_mount.path / "f")
    assert counts(device)["zone device", ("reserved",)] == all_of_it
    assert (sysfs / "badblocks").read_text() == ""
    dax_mount.umount()
    assert "not mounted" in daxemu("page-types", device, status=3)
