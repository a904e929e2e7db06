"""Tests of other mounts that must hold on a direct mount unchanged."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from daxemu.host.proc import maps
from tests.mount.test_touch import *  # noqa: F403
from tests.mount.test_touch import holding
from tests.support.mount import DAXEMU, PATIENCE, DaxMount


def test_the_mapping_is_of_the_media(dax_mount: DaxMount, file: Path) -> None:
    media = (dax_mount.device / "media").stat()
    with holding(file) as (process, _, child):
        assert list(maps.read(child, (os.major(media.st_dev), os.minor(media.st_dev))))
        process.kill()


def test_a_load_below_daxemu_run_is_not_under_another_run(dax_mount: DaxMount, file: Path) -> None:
    dax_mount.run("inject", file, "--offset", 4096)
    command = [*DAXEMU, "run", str(dax_mount.path), "--", *DAXEMU, "load", str(file), "--offset", "4K"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("SIGBUS: si_code BUS_MCEERR_AR, si_addr at file offset 0x1000")
