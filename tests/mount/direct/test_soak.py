"""Tests of other mounts that must hold on a direct mount unchanged."""

from __future__ import annotations

from tests.mount.test_soak import *  # noqa: F403
