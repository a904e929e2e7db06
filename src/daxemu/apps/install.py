"""Installed and missing programs, and the installation of missing ones."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from daxemu.apps.application import Needs
from daxemu.errors import DaxemuError, PermissionDenied, Unsupported

EXTRA_PATHS = ("/usr/lib/postgresql/*/bin",)
"""Directories of Debian with programs outside PATH."""
INCLUDE = Path("/usr/include")


def program(name: str) -> Path | None:
    """Return the path of a program; None if not installed."""
    found = shutil.which(name)
    if found is not None:
        return Path(found)
    return next(
        (path for pattern in EXTRA_PATHS for path in sorted(Path("/").glob(f"{pattern[1:]}/{name}"))), None
    )


def missing(needs: Needs) -> list[str]:
    """Return the names of missing programs, Python modules and C headers."""
    return [
        *(name for name in needs.programs if program(name) is None),
        *(name for name in needs.modules if importlib.util.find_spec(name) is None),
        *(name for name in needs.headers if not (INCLUDE / name).exists()),
    ]


def versions(needs: Needs) -> dict[str, str]:
    """Return the version of each installed package."""
    found = {}
    if needs.version and (asked := program(needs.version[0])) is not None:
        said = subprocess.run([asked, *needs.version[1:]], capture_output=True, text=True).stdout
        return {needs.version[0]: said.strip()}
    for package in needs.debian:
        if version := debian_version(package):
            found[package] = version
    for distribution in needs.pypi:
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def debian_version(package: str) -> str | None:
    """Return the version of an installed Debian package; None if not installed."""
    if shutil.which("dpkg-query") is None:
        return None
    asked = ["dpkg-query", "-W", "-f", "${Status}\t${Version}", package]
    status, _, version = subprocess.run(asked, capture_output=True, text=True).stdout.partition("\t")
    return version if status == "install ok installed" else None


def commands(all_needs: Iterable[Needs]) -> list[list[str]]:
    """Return the commands to install everything missing; an empty list if nothing is."""
    lacking = [needs for needs in all_needs if missing(needs)]
    debian = sorted({p for needs in lacking for p in needs.debian + needs.build if debian_version(p) is None})
    pypi = sorted({p for needs in lacking for p in needs.pypi if p not in versions(needs)})
    found = []
    if debian:
        found.append(["apt-get", "update", "-qq"])
        found.append(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *debian])
    if pypi:
        found.append([sys.executable, "-m", "pip", "install", "--quiet", *pypi])
    return found


def install(all_needs: Iterable[Needs], say: Callable[[str], None]) -> None:
    """Install everything missing; ``say`` is called with each command.

    Raises PermissionDenied without root, Unsupported without apt-get, DaxemuError if a command fails.
    """
    wanted = commands(all_needs)
    for command in wanted:
        if command[:2] == ["apt-get", "install"]:
            packages = " ".join(command[5:])
            if shutil.which("apt-get") is None:
                raise Unsupported(f"no apt-get here: install the packages that Debian calls {packages}")
            if os.geteuid() != 0:
                raise PermissionDenied(f"please run as root: apt-get install {packages}")
    for command in wanted:
        say(f"$ {' '.join(command)}")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        # Output to stderr: daxemu's own stdout may be JSON.
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr)
        if done.returncode:
            raise DaxemuError(f"{' '.join(command[:3])} ended with status {done.returncode}: see above")
    importlib.invalidate_caches()
