"""Declarations of fields: found through optional types and lists, not through records of several kinds."""

from __future__ import annotations

import msgspec
import pytest

from daxemu.fields import DeviceOffset, Field, Ino, Kind, Length, Pid, declared, values


class Sample(msgspec.Struct):
    at: DeviceOffset
    maybe: DeviceOffset | None
    many: tuple[Pid, ...]
    some: list[Pid]
    record: tuple[Ino, Length]
    text: str
    by_name: dict[str, int]


SAMPLE = Sample(1, None, (2, 3), [4], (5, 6), "", {})


def test_a_field_declares_kind_and_unit() -> None:
    offset, pid = Field(Kind.DEVICE_OFFSET, "bytes"), Field(Kind.PID)
    assert declared(Sample) == {"at": offset, "maybe": offset, "many": pid, "some": pid}
    assert [str(offset), str(pid)] == ["device offset, bytes", "process"]


@pytest.mark.parametrize(
    ("kind", "found"), [(Kind.DEVICE_OFFSET, [1]), (Kind.PID, [2, 3, 4]), (Kind.INODE, []), (Kind.LENGTH, [])]
)
def test_values_are_those_of_one_kind(kind: Kind, found: list[int]) -> None:
    assert values(SAMPLE, kind) == found
    assert values(msgspec.structs.replace(SAMPLE, maybe=7), kind) == [
        *found,
        *([7] if kind is Kind.DEVICE_OFFSET else []),
    ]
