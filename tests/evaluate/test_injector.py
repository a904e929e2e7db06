"""Injector: places of a plan's faults on a mount."""

from __future__ import annotations

import pytest

from daxemu.evaluate.faults import draw
from daxemu.evaluate.injector import Injector
from daxemu.fs.superblock import SUPER_BLOCKS
from tests.evaluate.plans import plan_with
from tests.support.quick import QuickMount
from tests.support.scene import PAGE

pytestmark = pytest.mark.mount


def test_metadata_faults_hit_superblocks_and_records_only(quick_mount: QuickMount) -> None:
    """Faults hit both superblocks and both replicas of the records, nothing else; repeatable for a seed."""
    for name in ("a", "b", "c"):
        (quick_mount.path / name).write_bytes(b"x" * 999 * PAGE)
    plan = plan_with('expected = 60\ntarget = "metadata"\nunit = { 512 = 1 }')
    with quick_mount.client() as client:
        size = client.request("status")["size"]
        cells = client.request("survey", cells=size // PAGE // 4)["cells"]
        metadata = {index for index, cell in enumerate(cells) if cell["metadata"]}

        def hit() -> list[int]:
            injector = Injector(client, quick_mount.path, [], size)
            return [injector._in_metadata(fault.place) for fault in draw(plan, plan.faults[0], 0)]

        found = hit()
        assert found == hit()
    assert {at // PAGE // 4 for at in found} <= metadata
    middle = size // 2
    first = [at for at in found if at < SUPER_BLOCKS * PAGE]
    second = [at for at in found if middle <= at < middle + SUPER_BLOCKS * PAGE]
    assert first
    assert second
    others = set(found) - {*first, *second}
    assert len({at // PAGE for at in others}) > 5


def test_every_metadata_byte_has_a_place(quick_mount: QuickMount) -> None:
    with quick_mount.client() as client:
        size = client.request("status")["size"]
        injector = Injector(client, quick_mount.path, [], size)
        total = client.request("survey")["cells"][0]["metadata"]
        places = [injector._in_metadata((i + 0.5) / 200) for i in range(200)]
        assert places == sorted(set(places))
        assert injector._in_metadata(0.0) == 0
        last = injector._in_metadata(1 - 0.5 / total)
        assert last % PAGE == PAGE - 1
        assert max(places) < last
