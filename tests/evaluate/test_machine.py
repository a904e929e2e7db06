"""Machine of a trial: behaviour on a signal."""

from __future__ import annotations

import pytest

from daxemu.errors import DaxemuError
from daxemu.evaluate.machine import Ending, daxemu


def test_a_signal_ends_the_process_outside_hold() -> None:
    with pytest.raises(SystemExit) as ended:
        Ending()(15, None)
    assert ended.value.code == 130


def test_a_signal_is_deferred_to_the_end_of_hold() -> None:
    ending = Ending()
    done = []

    def work() -> None:
        with ending.hold():
            with ending.hold():
                ending(15, None)
                done.append("inner")
            done.append("outer")
        done.append("never")

    with pytest.raises(SystemExit):
        work()
    assert done == ["inner", "outer"]


def test_a_failed_verb_raises_its_error_text() -> None:
    with pytest.raises(DaxemuError, match="/nowhere is not a daxemu device"):
        daxemu("fsck", "/nowhere")
