"""Tests of other mounts that must hold on a direct mount unchanged."""

from __future__ import annotations

from tests.mount.test_injection import *  # noqa: F403

# A store is on the media at once: no store is lost at write-back.
del test_lost_store_is_silent_on_dax  # noqa: F821
del test_lost_store_as_an_error_of_fsync  # noqa: F821
del test_lost_store_as_an_error_of_msync  # noqa: F821
