"""Tests of other mounts that must hold on a direct mount unchanged."""

from __future__ import annotations

import os
from pathlib import Path

from daxemu.host.proc import maps
from tests.mount.test_touch import *  # noqa: F403
from tests.mount.test_touch import holding
from tests.support.mount import DaxMount


def test_the_mapping_is_of_the_media(dax_mount: DaxMount, file: Path) -> None:
    media = (dax_mount.device / "media").stat()
    with holding(file) as (process, _, child):
        assert list(maps.read(child, (os.major(media.st_dev), os.minor(media.st_dev))))
        process.kill()
