"""The ptrace(2) bindings."""

from __future__ import annotations

import contextlib
import errno

import pytest

from daxemu.host.tracer import ptrace


def test_errors_carry_errno() -> None:
    with pytest.raises(OSError, match="SEIZE") as caught:
        ptrace.seize(1 << 22)
    assert caught.value.errno == errno.ESRCH
    with contextlib.suppress(ProcessLookupError):
        ptrace.tgkill(1 << 22, 1 << 22, 0)
