"""Selection of the events for a follower."""

from __future__ import annotations

import pytest

from daxemu.events import (
    DeviceRemoved,
    Event,
    FaultRepeated,
    FileDamaged,
    FilesystemShutdown,
    OutsideKernelControl,
    PoisonInjected,
    PopulateFailed,
    SettingChanged,
    SignalSent,
    encode,
)
from daxemu.protocol import FileRange, Follow
from daxemu.supervisor.selection import selects

POISON = PoisonInjected(offset=8192, length=4096)
DAMAGE = FileDamaged(ino=7, path="/f", offset=4096, length=4096)
SIGNAL = SignalSent(pid=3, tid=4, comm="c", code=4, address=0, lsb=12, pfn=9, result="delivered")
SHUTDOWN = FilesystemShutdown(device="d", reason="r")
REMOVED = DeviceRemoved(device="d", told=0)
SETTING = SettingChanged(name="early_kill", value="1")
OUTSIDE = OutsideKernelControl(pfn=9, nr_pages=1)
ALL = [POISON, DAMAGE, SIGNAL, SHUTDOWN, REMOVED, SETTING, OUTSIDE]
EVERYBODYS = [SHUTDOWN, REMOVED, SETTING]


@pytest.mark.parametrize(
    ("wanted", "sent"),
    [
        (Follow(), ALL),
        (Follow(events=["FileDamaged", "SignalSent"]), [DAMAGE, SIGNAL]),
        (Follow(events=[]), []),
        (Follow(files=[]), EVERYBODYS),
        (Follow(files=[FileRange(7)]), [DAMAGE, *EVERYBODYS]),
        (Follow(files=[FileRange(8)]), EVERYBODYS),
        (Follow(files=[FileRange(8), FileRange(7, 8191)]), [DAMAGE, *EVERYBODYS]),
        (Follow(files=[FileRange(7, 8192)]), EVERYBODYS),
        (Follow(files=[FileRange(7, 0, 4096)]), EVERYBODYS),
        (Follow(files=[FileRange(7, 0, 4097)]), [DAMAGE, *EVERYBODYS]),
        (Follow(ranges=[(0, 8192)]), EVERYBODYS),
        (Follow(ranges=[(0, 1), (12287, 1)]), [POISON, *EVERYBODYS]),
        (Follow(ranges=[(12288, 4096)]), EVERYBODYS),
        (Follow(pids=[3]), [SIGNAL, *EVERYBODYS]),
        (Follow(pids=[4]), EVERYBODYS),
        (Follow(pids=[3], files=[FileRange(7)]), [DAMAGE, SIGNAL, *EVERYBODYS]),
        (Follow(pids=[3], events=["SignalSent"]), [SIGNAL]),
    ],
    ids=repr,
)
def test_a_follower_gets_the_selected_events(wanted: Follow, sent: list[Event]) -> None:
    assert {id(event) for event in ALL if selects(wanted, encode(event))} == {id(event) for event in sent}


FAULT = FaultRepeated(pid=3, tid=4, comm="c", ino=7, path="/f", offset=4096, times=100)
POPULATE = PopulateFailed(
    pid=3,
    tid=4,
    comm="c",
    call="mlock",
    ino=7,
    path="/f",
    offset=0,
    length=4096,
    result="killed",
    exposed=(5, 6),
)


@pytest.mark.parametrize("event", [FAULT, POPULATE], ids=["fault", "populate"])
@pytest.mark.parametrize(
    "wanted", [Follow(files=[FileRange(7)]), Follow(pids=[3]), Follow(pids=[3], files=[FileRange(8)])]
)
def test_an_event_about_a_file_and_a_process_concerns_followers_of_either(
    event: Event, wanted: Follow
) -> None:
    assert selects(wanted, encode(event))
    assert not selects(Follow(pids=[4], files=[FileRange(8)], ranges=[(0, 1 << 40)]), encode(event))


def test_an_event_concerns_followers_of_each_process_that_it_lists() -> None:
    assert [selects(Follow(pids=[pid]), encode(POPULATE)) for pid in (5, 6, 7)] == [True, True, False]


def test_an_offset_without_a_length_is_a_byte() -> None:
    ranges = [(4095, 1), (4096, 1), (4097, None)]
    wanted = [Follow(files=[FileRange(7, *span)]) for span in ranges]
    assert [selects(one, encode(FAULT)) for one in wanted] == [False, True, False]
