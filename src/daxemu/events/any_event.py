"""The union of all events, for type checkers. Made by `make protocol` of the classes."""

from __future__ import annotations

from daxemu.events.failures import (
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
    DirectMappingRefused,
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
from daxemu.events.rules import (
    RuleFailed,
    RuleFired,
)

AnyEvent = (
    CorruptionFound
    | DaxActiveAtRemove
    | DeviceRemoved
    | DeviceTightened
    | DirectMappingRefused
    | EventsRepeated
    | FaultRepeated
    | FileDamaged
    | FilesystemShutdown
    | LoopStalled
    | MadviseInjected
    | MemoryFailureHandled
    | MetadataRewritten
    | MetadataUpgraded
    | Mounted
    | NotifyFailure
    | OutsideKernelControl
    | PoisonCleared
    | PoisonInjected
    | PopulateFailed
    | RepairFinished
    | RepairProgress
    | RepairStrategyFailed
    | RuleFailed
    | RuleFired
    | ScrubFound
    | SettingChanged
    | SignalSent
    | SilentlyCorrupted
    | StoreLost
    | UnexpectedError
    | Unmounted
)
