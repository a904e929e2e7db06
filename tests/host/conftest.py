"""Both implementations of the parts that exist in C and in Python."""

from __future__ import annotations

import pytest

from daxemu.host import victims


def without_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable the C library, as where victims/*.c were not built, here and in tracers started from now on."""
    monkeypatch.setattr(victims, "MISSING", "for this test")
    monkeypatch.setenv("DAXEMU_VICTIMS", "python")


@pytest.fixture(params=["C", "Python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test with C and with Python."""
    if request.param == "Python":
        without_c(monkeypatch)
    elif victims.MISSING is not None:
        pytest.skip(victims.MISSING)
