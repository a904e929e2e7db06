"""Typed records of everything that happened, their JSON form, and the kernel's own log line for each.

An event says what *was* done, never what will be. Each one that the kernel would log knows that line
(``dmesg()``); the others return None there. Addresses and offsets are bytes; ``pfn`` is a page frame number.

``base``      the base class and its vocabulary
``mounts``    a mount, its supervisor, the filesystem's records
``media``     poison, silent corruption, damaged files
``failures``  memory_failure(), signals, removal
``repairs``   repair strategies
"""

from __future__ import annotations

import msgspec

from daxemu.events.base import (
    Emit,
    Event,
    Outcome,
    PageType,
    signalled,
)
from daxemu.events.failures import (
    KILLED_BY_SIGBUS,
    DaxActiveAtRemove,
    DeviceRemoved,
    FaultRepeated,
    MemoryFailureHandled,
    NotifyFailure,
    OutsideKernelControl,
    PopulateFailed,
    SignalSent,
)
from daxemu.events.media import (
    CorruptionFound,
    FileDamaged,
    MadviseInjected,
    PoisonCleared,
    PoisonInjected,
    ScrubFound,
    SilentlyCorrupted,
    StoreLost,
)
from daxemu.events.mounts import (
    DeviceTightened,
    EventsRepeated,
    FilesystemShutdown,
    LoopStalled,
    MetadataRewritten,
    MetadataUpgraded,
    Mounted,
    SettingChanged,
    UnexpectedError,
    Unmounted,
)
from daxemu.events.repairs import (
    RepairFinished,
    RepairProgress,
    RepairStrategyFailed,
)

__all__ = [
    "EVENT_TYPES",
    "KILLED_BY_SIGBUS",
    "AnyEvent",
    "CorruptionFound",
    "DaxActiveAtRemove",
    "DeviceRemoved",
    "DeviceTightened",
    "Emit",
    "Event",
    "EventsRepeated",
    "FaultRepeated",
    "FileDamaged",
    "FilesystemShutdown",
    "LoopStalled",
    "MadviseInjected",
    "MemoryFailureHandled",
    "MetadataRewritten",
    "MetadataUpgraded",
    "Mounted",
    "NotifyFailure",
    "Outcome",
    "OutsideKernelControl",
    "PageType",
    "PoisonCleared",
    "PoisonInjected",
    "PopulateFailed",
    "RepairFinished",
    "RepairProgress",
    "RepairStrategyFailed",
    "ScrubFound",
    "SettingChanged",
    "SignalSent",
    "SilentlyCorrupted",
    "StoreLost",
    "UnexpectedError",
    "Unmounted",
    "decode",
    "encode",
    "signalled",
]

EVENT_TYPES: tuple[type[Event], ...] = (
    Mounted,
    Unmounted,
    DeviceTightened,
    SettingChanged,
    EventsRepeated,
    PoisonInjected,
    PoisonCleared,
    ScrubFound,
    MadviseInjected,
    MemoryFailureHandled,
    OutsideKernelControl,
    SignalSent,
    PopulateFailed,
    FaultRepeated,
    FileDamaged,
    StoreLost,
    CorruptionFound,
    SilentlyCorrupted,
    RepairFinished,
    RepairProgress,
    RepairStrategyFailed,
    NotifyFailure,
    UnexpectedError,
    LoopStalled,
    MetadataRewritten,
    MetadataUpgraded,
    FilesystemShutdown,
    DaxActiveAtRemove,
    DeviceRemoved,
)

AnyEvent = (
    Mounted
    | Unmounted
    | DeviceTightened
    | SettingChanged
    | EventsRepeated
    | PoisonInjected
    | PoisonCleared
    | ScrubFound
    | MadviseInjected
    | MemoryFailureHandled
    | OutsideKernelControl
    | SignalSent
    | PopulateFailed
    | FaultRepeated
    | FileDamaged
    | StoreLost
    | CorruptionFound
    | SilentlyCorrupted
    | RepairFinished
    | RepairProgress
    | RepairStrategyFailed
    | NotifyFailure
    | UnexpectedError
    | LoopStalled
    | MetadataRewritten
    | MetadataUpgraded
    | FilesystemShutdown
    | DaxActiveAtRemove
    | DeviceRemoved
)

_decoder = msgspec.json.Decoder(AnyEvent)


def encode(event: Event) -> bytes:
    """One JSON object on one line, without the newline."""
    return msgspec.json.encode(event)


def decode(line: bytes | str) -> Event:
    """The event of one line. Raises msgspec.ValidationError or msgspec.DecodeError for anything else."""
    try:
        event: Event = _decoder.decode(line)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from error
    return event
