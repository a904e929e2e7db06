"""Fixtures of the tests on direct mounts: the same names as on other mounts, so the same tests can run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mount import DaxMount, dax_mount_at
from tests.support.quick import QuickMount, quick_mount_at
from tests.support.zygote import Zygote


@pytest.fixture
def dax_mount(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[DaxMount]:
    """A fresh direct mount; the actors of its scene are programs under ``daxemu run``."""
    if os.geteuid() != 0:
        pytest.skip("direct mounts need root")
    with dax_mount_at(tmp_path, *getattr(request, "param", "1G").split(), mount=False) as made:
        made.mount("--direct")
        yield made


@pytest.fixture
def quick_mount(tmp_path: Path, zygote: Zygote, request: pytest.FixtureRequest) -> Iterator[QuickMount]:
    """A fresh direct mount, made quicker than ``dax_mount``. The indirect parameters are the size of the
    device in bytes.
    """
    if os.geteuid() != 0:
        pytest.skip("direct mounts need root")
    with quick_mount_at(tmp_path, zygote, getattr(request, "param", 1 << 30), direct=True) as made:
        yield made
