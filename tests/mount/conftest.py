"""Fixtures of the tests on real mounts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mount import DaxMount
from tests.support.quick import QuickMount, quick_mount_at
from tests.support.scene import PAGES, Scene
from tests.support.zygote import Zygote, shared_zygote


@pytest.fixture(scope="session")
def zygote() -> Zygote:
    """Process that forks supervisors."""
    return shared_zygote()


@pytest.fixture
def quick_mount(tmp_path: Path, zygote: Zygote, request: pytest.FixtureRequest) -> Iterator[QuickMount]:
    """A fresh mount, as ``dax_mount`` but quicker. The indirect parameters are the size of the device in
    bytes.
    """
    with quick_mount_at(tmp_path, zygote, getattr(request, "param", 1 << 30)) as made:
        yield made


@pytest.fixture
def scene(dax_mount: DaxMount) -> Iterator[Scene]:
    """A mount with the file ``f``, whose page i holds letter i. The actors of the test end before the mount
    does.
    """
    with Scene(dax_mount) as made:
        dax_mount.make_file("f", PAGES)
        yield made


@pytest.fixture
def early(scene: Scene) -> Scene:
    """A scene with early_kill=1, the sysctl."""
    scene.set(early_kill=1)
    return scene
