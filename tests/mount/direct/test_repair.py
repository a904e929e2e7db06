"""Tests of other mounts that must hold on a direct mount unchanged.

Left out: tests in which a page counts as stored to because the page is mapped for writing, or in which a
store is lost. On a direct mount each first store is known, and is on the media at once: test_unseen_stores.
A load of silently corrupt bytes is no event, as on DAX.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.test_repair import *  # noqa: F403
from tests.support.mount import dax_mount_at
from tests.support.scene import PAGES, Scene

for _name in (
    "repaired",
    "test_a_strategy_that_cannot_repair_latent_poison_is_asked_once",
    "test_latent_poison_that_was_mapped_for_writing_is_not_believed",
    "test_mapped_for_writing_is_not_believed",
    "test_mapped_for_writing_may_be_trusted_but_a_lost_store_never",
    "test_silent_corruption_is_found_by_a_load",
    "test_a_dirty_mapping_that_was_synced_is_copied",
    "test_a_touch_of_a_page_just_revoked_believes_no_copy",
):
    del globals()[_name]


@pytest.fixture(name="repaired")
def _repaired(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """As in tests/mount/test_repair.py, on a direct mount."""
    with dax_mount_at(tmp_path, "64M", mount=False) as made:
        made.mount("--direct", "--repair", request.param)
        with Scene(made) as scene:
            made.make_file("f", PAGES)
            scene.set(early_kill=1)
            yield scene
