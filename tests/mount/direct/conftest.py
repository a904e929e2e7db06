"""Fixtures of the tests on direct mounts: the same names as on other mounts, so the same tests can run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mount import DaxMount, dax_mount_at


@pytest.fixture
def dax_mount(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[DaxMount]:
    """A fresh direct mount; the actors of its scene are programs under ``daxemu run``."""
    if os.geteuid() != 0:
        pytest.skip("direct mounts need root")
    with dax_mount_at(tmp_path, *getattr(request, "param", "1G").split(), mount=False) as made:
        made.mount("--direct")
        yield made
