"""Fixtures of the tests on real mounts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.mount import DaxMount
from tests.support.scene import PAGES, Scene


@pytest.fixture
def scene(dax_mount: DaxMount) -> Iterator[Scene]:
    """A mount with the file ``f``, whose page i holds letter i; the test's actors end before it."""
    with Scene(dax_mount) as made:
        dax_mount.make_file("f", PAGES)
        yield made


@pytest.fixture
def early(scene: Scene) -> Scene:
    """A scene with early_kill=1, the sysctl."""
    scene.set(early_kill=1)
    return scene
