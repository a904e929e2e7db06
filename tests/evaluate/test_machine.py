"""What a trial's machine does when it is told to end."""

from __future__ import annotations

import pytest

from daxemu.errors import DaxemuError
from daxemu.evaluate.machine import Ending, daxemu


def test_a_signal_ends_what_is_not_held() -> None:
    with pytest.raises(SystemExit) as ended:
        Ending()(15, None)
    assert ended.value.code == 130


def test_a_signal_waits_for_what_must_be_whole() -> None:
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


def test_a_verb_that_fails_says_why() -> None:
    with pytest.raises(DaxemuError, match="/nowhere is not a daxemu device"):
        daxemu("fsck", "/nowhere")
