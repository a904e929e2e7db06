"""Missing programs, and installation commands."""

from __future__ import annotations

import os
import shutil
import sys

import pytest

from daxemu.apps import install
from daxemu.apps.application import Needs
from daxemu.apps.matrix import wanted
from daxemu.apps.programs import APPLICATIONS, application_called
from daxemu.errors import InvalidArgument, PermissionDenied, Unsupported
from tests.support.mount import daxemu

NOWHERE = Needs(
    debian=("daxemu-no-such-package", "gcc"),
    pypi=("daxemu-no-such-distribution",),
    programs=("daxemu-no-such-program", "sh"),
    modules=("daxemu_no_such_module", "numpy"),
    headers=("daxemu-no-such-header.h",),
)
HERE = Needs(programs=("sh",), modules=("numpy",), pypi=("numpy",))


def test_missing_names_programs_modules_and_headers() -> None:
    assert install.missing(HERE) == []
    assert install.missing(NOWHERE) == [
        "daxemu-no-such-program",
        "daxemu_no_such_module",
        "daxemu-no-such-header.h",
    ]


def test_only_missing_packages_would_be_installed() -> None:
    assert install.commands([HERE]) == []
    update, get, pip = install.commands([HERE, NOWHERE, NOWHERE])
    assert update[:2] == ["apt-get", "update"]
    assert get[:3] == ["apt-get", "install", "-y"]
    assert "daxemu-no-such-package" in get
    assert get.count("daxemu-no-such-package") == 1
    assert pip == [sys.executable, "-m", "pip", "install", "--quiet", "daxemu-no-such-distribution"]


def test_installing_without_root_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("apt-get") is None:
        pytest.skip("no apt-get here to be refused")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PermissionDenied, match="please run as root: apt-get"):
        install.install([NOWHERE], print)


def test_without_apt_get_the_error_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(Unsupported, match=r"no apt-get here: .* daxemu-no-such-package"):
        install.install([NOWHERE], print)


def test_an_installed_package_has_a_version() -> None:
    assert install.versions(HERE)["numpy"]
    assert install.versions(NOWHERE).get("daxemu-no-such-package") is None


def test_an_absent_program_is_shown_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    listed = daxemu("apps", "--list", "--only", "sqlite3")
    assert "absent: sqlite3" in listed
    (cell,) = wanted(["sqlite3"], ["late"])
    assert cell.why_not == "absent: sqlite3"
    said = daxemu("apps", "--only", "sqlite3", "--situation", "late", status=8)
    assert said == "daxemu: sqlite3: absent: sqlite3; to install absent programs: daxemu apps --install\n"


def test_every_program_has_a_unique_name_and_needs() -> None:
    assert len({each.name for each in APPLICATIONS}) == len(APPLICATIONS) >= 12
    for each in APPLICATIONS:
        assert each.needs.debian or each.needs.pypi
        assert each.needs.programs or each.needs.modules
        assert application_called(each.name) is each


def test_an_unknown_name_is_refused_with_the_known_names() -> None:
    with pytest.raises(InvalidArgument, match="no program 'oracle': known programs are sqlite3, "):
        wanted(["oracle"])
    with pytest.raises(InvalidArgument, match="no situation 'flood': known situations are healthy, before, "):
        wanted([], ["flood"])
    assert "ends in .md or .json" in daxemu("apps", "-o", "x.html", status=2)
    assert "make the directory /nowhere first" in daxemu("apps", "-o", "/nowhere/x.md", status=2)


def test_a_program_without_a_journal_has_no_journal_cells() -> None:
    reasons = {cell.situation.name: cell.why_not for cell in wanted(["numpy-memmap"])}
    assert reasons["journal"] == reasons["journal-live"] == reasons["journal-silent"] == "no journal"
    assert reasons["late"] == ""
    said = daxemu("apps", "--only", "numpy-memmap", "--situation", "journal", status=8)
    assert "numpy-memmap: no journal" in said
