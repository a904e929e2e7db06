"""Every recorded scenario, played here: no difference from the reference kernel without a reason.

`python -m tests.conformance.fidelity` makes docs/fidelity-table.md of the same.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conformance.recording import MODES, scenarios
from tests.conformance.run import run
from tests.support.zygote import shared_zygote

pytestmark = [
    pytest.mark.mount,
    pytest.mark.timeout(60),
    pytest.mark.skipif(os.geteuid() != 0, reason="read-ahead can only be switched off by root"),
]


@pytest.mark.parametrize("mode", MODES, ids=("cache", "direct"))
@pytest.mark.parametrize("name", scenarios())
def test_as_the_kernel_or_for_a_reason(name: str, mode: str, tmp_path: Path) -> None:
    verdict = run(scenarios()[name], shared_zygote(), tmp_path, mode)
    if verdict.not_yet is not None:
        pytest.skip(f"not yet: {verdict.not_yet}")
    unexplained = "\n".join(str(found) for found in verdict.unexplained)
    assert not unexplained, f"{name}: {verdict.scenario.text}\n{unexplained}"
