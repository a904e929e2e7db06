"""Tests of other mounts that must hold on a direct mount unchanged.

Left out: tests that map files in the test's own process, which is not under ``daxemu run``.
"""

from __future__ import annotations

from tests.mount.test_space_operations import *  # noqa: F403

for _name in (
    "test_mapped_pages_of_the_range_read_zeros",
    "test_punching_inside_dirty_pages_keeps_the_rest_of_them",
):
    del globals()[_name]
