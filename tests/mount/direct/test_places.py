"""Tests of other mounts that must hold on a direct mount unchanged."""

from __future__ import annotations

from tests.mount.test_places import *  # noqa: F403

# A program that is not under daxemu run has no shared mapping.
del test_every_sees_a_store_that_is_not_written_back  # noqa: F821
del test_find_makes_no_page_present_elsewhere  # noqa: F821
del test_find_sees_a_store_that_is_not_written_back  # noqa: F821
