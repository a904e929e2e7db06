"""Tests of other mounts that must hold on a direct mount unchanged, and AR of a load that finds poison."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from daxemu.uapi import HPAGE_PMD_NR, PAGE_SIZE
from tests.mount.test_huge import *  # noqa: F403
from tests.mount.test_huge import BAD, mapper
from tests.support.mount import dax_mount_at
from tests.support.scene import Scene, ar, consumes

del test_found_latent_poison_is_signalled_to_all_with_the_2_mib_present  # noqa: F821


@pytest.fixture  # type: ignore[no-redef]
def scene(tmp_path: Path) -> Iterator[Scene]:
    """A direct mount with early_kill=1 and the file ``f`` of 3 times 2 MiB, whose page i holds letter i."""
    with dax_mount_at(tmp_path, "256M", "--align", "2M", mount=False) as mount:
        mount.mount("--direct")
        with Scene(mount) as made:
            mount.make_file("f", 3 * HPAGE_PMD_NR)
            made.set(early_kill=1)
            yield made


def test_a_load_that_finds_poison_names_the_2_mib(scene: Scene) -> None:
    """The machine check names the mapping of the page; a page fault over known poison names a page."""
    p0, p1 = mapper(scene, touch=[BAD]), mapper(scene, "p1", touch=[])
    scene.mount.inject("f", (BAD * PAGE_SIZE, PAGE_SIZE), latent=True)
    consumes(p1, f"tr 0 {BAD}", ar(BAD) | {"lsb": 21})
    (event,) = (event for event in scene.signal_events(p1) if event["code"] == 4)
    assert event["lsb"] == 21
    assert p0.wait_signal().recorded()["code"] == "BUS_MCEERR_AO"
    consumes(p0, f"tr 0 {BAD}", ar(BAD))
