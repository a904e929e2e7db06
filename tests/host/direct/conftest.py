"""Program and media of the tests of agents."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.actor import compile_victim


@pytest.fixture(scope="session")
def mapper(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(compile_victim("mapper"))


@pytest.fixture
def media() -> Iterator[Path]:
    path = Path(f"/dev/shm/daxemu-test-media-{os.getpid()}")
    yield path
    path.unlink(missing_ok=True)
