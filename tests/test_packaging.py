"""Archives: built here, installed into otherwise empty venvs, and used from the venvs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import daxemu
from tests.support.mount import clear_away
from tests.support.pages import TOP

pytestmark = [pytest.mark.mount, pytest.mark.timeout(900)]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}


def run(*command: str | Path, cwd: Path, shell: bool = False) -> str:
    """Run a command, which must succeed; return the output."""
    done = subprocess.run(
        str(command[0]) if shell else [*map(str, command)],
        shell=shell,
        cwd=cwd,
        env=CLEAN,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the sdist, and the wheel built from it."""
    made = tmp_path_factory.mktemp("archives")
    run(sys.executable, "-m", "build", "--outdir", made, TOP, cwd=made)
    return made


def test_the_sdist_installs_as_the_page_says(archives: Path, tmp_path: Path) -> None:
    (sdist,) = archives.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / f"daxemu-{daxemu.__version__}"
    assert not list(source.glob("tests"))
    page = (source / "docs" / "howto" / "install.md").read_text()
    commands = re.findall(r"^    (python3 -m venv.*|\.venv/bin/.*)$", page, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        run(command.replace("python3", sys.executable, 1), cwd=source, shell=True)
    program = source / ".venv" / "bin" / "daxemu"
    assert run(program, "--version", cwd=tmp_path) == f"daxemu, version {daxemu.__version__}\n"
    findings = json.loads(run(program, "doctor", "--json", cwd=tmp_path))["findings"]
    verdicts = {finding["subject"]: finding["verdict"] for finding in findings}
    assert (verdicts["supplement"], verdicts["pyfuse3"]) == ("ok", "ok")
    mountpoint, device = tmp_path / "mnt", tmp_path / "pmem"
    mountpoint.mkdir()
    try:
        run(program, "mkfs", device, "--size", "64M", cwd=tmp_path)
        run(program, "mount", device, mountpoint, cwd=tmp_path)
        (mountpoint / "f").write_bytes(b"x" * 4096)
        assert "Recovered" in run(program, "inject", mountpoint / "f", cwd=tmp_path)
        run(program, "umount", mountpoint, cwd=tmp_path)
    finally:
        clear_away(mountpoint)


def test_the_example_project_passes_with_nothing_but_the_wheel_and_pytest(
    archives: Path, tmp_path: Path
) -> None:
    (wheel,) = archives.glob("*.whl")
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", wheel, "pytest", cwd=tmp_path)
    project = tmp_path / "ledger"
    shutil.copytree(TOP / "examples" / "ledger", project)
    assert "7 passed" in run(python, "-m", "pytest", "-q", cwd=project)
