"""Fixtures: the quick mounts of tests/mount."""

from __future__ import annotations

from tests.mount.conftest import quick_mount as quick_mount
from tests.mount.conftest import zygote as zygote
