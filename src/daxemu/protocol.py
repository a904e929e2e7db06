"""Requests and replies of the control socket, as types. One JSON object a line; ``op`` names the request.

``make protocol`` generates docs/protocol.md from this file. A request is a ``Request[R]``; ``R`` is the type
of the reply.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Never, TypeVar, Union, get_args

import msgspec

from daxemu.errors import InvalidArgument
from daxemu.events.mounts import Mode
from daxemu.failure_kind import FailureKind, injected_kind
from daxemu.fields import (
    Address,
    DeviceOffset,
    FileOffset,
    Ino,
    Length,
    Pages,
    Pfn,
    Pid,
    Processes,
    Seconds,
    Signals,
    Tid,
)
from daxemu.internals_report import InternalsReport
from daxemu.rule import Action, On, RuleAdded, RuleList
from daxemu.survey_report import SurveyReport

R = TypeVar("R", bound=msgspec.Struct)


class PoisonedRange(msgspec.Struct, gc=False):
    """Result of one range of an injection. ``offset`` and ``length``: device bytes. ``pfn`` and ``nr_pages``:
    the pages that memory_failure() was called for. ``signals``: SIGBUS sent, one for each mapping of each
    victim. ``processes``: distinct processes among the receivers. ``told``: the old name of ``signals``.
    """

    offset: DeviceOffset
    length: Length
    pfn: Pfn
    nr_pages: Pages
    outcome: str
    told: Signals
    signals: Signals
    processes: Processes

    @property
    def kind(self) -> FailureKind:
        """The kind of failure; with a kind other than poison, ``outcome`` is the kind."""
        return FailureKind.of_outcome(self.outcome)


class Injected(msgspec.Struct):
    ranges: list[PoisonedRange]
    rounded: bool
    """True if a range was rounded out to whole sectors."""
    holes: Length
    """Bytes of the ranges that are holes of the file. A hole has no media to poison."""


class Advised(msgspec.Struct):
    """``errno``: the result of the system call, 0 or an error number. Each signal has been queued."""

    errno: int


class Cleared(msgspec.Struct):
    ranges: list[tuple[int, int]]
    bytes: Length


class BadblockList(msgspec.Struct):
    """``ranges``: [first sector, count], 512-byte sectors of the device."""

    ranges: list[tuple[int, int]]
    sectors: int


class DamagedRange(msgspec.Struct):
    ino: Ino
    path: str
    offset: FileOffset
    length: Length


class DamagedList(msgspec.Struct):
    files: list[DamagedRange]


class MappedFile(msgspec.Struct):
    """Mapping of a file by a process: ``length`` bytes from byte ``offset`` of the file on, untouched too."""

    pid: Pid
    comm: str
    ino: Ino
    offset: FileOffset
    length: Length


class MappedFileList(msgspec.Struct):
    mapped: list[MappedFile]


class Extent(msgspec.Struct):
    """A run of a file, in bytes. ``device_offset`` is null for a hole. ``shared_by``: number of links to the
    extent; 1 if no other file shares the extent.
    """

    offset: FileOffset
    length: Length
    device_offset: DeviceOffset | None
    pfn: Pfn | None
    shared_by: int
    poisoned: bool


class FileMap(msgspec.Struct):
    ino: Ino
    path: str
    size: Length
    extents: list[Extent]


class Shared(msgspec.Struct):
    bytes: Length


class Removed(msgspec.Struct):
    """``signals``, ``processes`` and ``told`` as in PoisonedRange. A removal sends one signal to each
    process.
    """

    told: Signals
    was_idle: bool
    signals: Signals
    processes: Processes


class Progress(msgspec.Struct):
    """Progress of a newly chosen strategy: bytes processed, of all bytes to process."""

    done_bytes: Length
    total_bytes: Length


class RepairReport(msgspec.Struct):
    """``recovered``, ``lost``, ``cannot``, ``failed``: number of failures with this verdict.
    ``space_bytes``: bytes that the strategy keeps. ``broken``: the reason why no hook of the strategy is
    called any more, else null. ``progress``: progress of the strategy while it processes the data that is
    older than its choice, else null.
    """

    strategy: str
    recovered: int
    lost: int
    cannot: int
    failed: int
    space_bytes: Length
    broken: str | None
    progress: Progress | None = None


class Repaired(msgspec.Struct):
    """Result of a repair. ``recovered``, ``lost``, ``left``: numbers of blocks of 4096 bytes."""

    strategy: str
    recovered: int
    lost: int
    left: int
    reason: str | None


class StatusReport(msgspec.Struct):
    device: str
    mountpoint: str
    pid: Pid
    state: Literal["mounted", "shut down", "removed"]
    reason: str | None
    size: Length
    base_pfn: Pfn
    struct_pages: bool
    blocks: int
    free_blocks: int
    inodes: int
    extents: int
    open_files: int
    badblocks: int
    poisoned_sectors: int
    scrubs: int
    """Number of background scrubs so far."""
    settings: dict[str, str]
    counters: dict[str, int]
    repair: RepairReport
    events: int
    supplement: str
    tracer: str
    layouts: str = "off"
    """Number of requests that C answered without the filesystem (fs/layouts.py), or "off"."""
    mode: Mode = "page cache"
    """Shared mappings are of the kernel's page cache, or of the media itself (``mount --direct``)."""


class Settled(msgspec.Struct):
    """``seconds``: duration of the wait."""

    seconds: Seconds


class Done(msgspec.Struct):
    """Empty reply: the request was done."""


class Reply(msgspec.Struct):
    """Envelope of a reply. With ``ok`` true, ``result`` is the struct of the reply. With ``ok`` false,
    ``error`` names one of errors.ERRORS and ``message`` states the reason.
    """

    ok: bool
    result: msgspec.Raw | None = None
    error: str | None = None
    message: str | None = None


class Request(msgspec.Struct, Generic[R], tag_field="op", forbid_unknown_fields=True):
    """Base class of all requests; the type argument is the type of the reply."""

    is_long: ClassVar[bool] = False
    """Whether the supervisor may take minutes for the answer."""


class Inject(Request[Injected], tag="inject", omit_defaults=True):
    """Poison ranges of the file ``ino``, or of the device if ``ino`` is null. ``ranges``: pairs
    [offset, length] in bytes; each pair is one failure.
    """

    is_long = True

    ranges: list[tuple[int, int]]
    ino: Ino | None = None
    latent: bool = False
    """The same as ``kind`` latent."""
    silent: bool = False
    """The same as ``kind`` silent: change the bytes without poison. ``seed`` selects the new bytes."""
    seed: int = 0
    kind: FailureKind | None = None
    """Poison, latent or silent; null: by ``latent`` and ``silent``, otherwise poison."""

    @property
    def failure_kind(self) -> FailureKind:
        """The kind of failure. Raises InvalidArgument for a kind without ranges, or two kinds."""
        named = FailureKind.SILENT if self.silent else FailureKind.LATENT if self.latent else None
        kind = self.kind or named or FailureKind.POISON
        if named not in (None, kind):
            raise InvalidArgument(f"kind is {kind}, but {named} is true: give one of them")
        return injected_kind(kind)


def kind_fields(kind: FailureKind) -> dict[str, Any]:
    """Return the fields of ``inject`` for ``kind``. Supervisors of earlier versions know the booleans."""
    if kind is FailureKind.POISON:
        return {}
    return {kind.value: True} if kind.value in Inject.__struct_fields__ else {"kind": kind}


class Madvise(Request[Advised], tag="madvise"):
    """``madvise_inject_error()``: have pages fail one after another, or go offline (``soft``). The caller is
    the thread ``tid``, which waits in madvise(2). ``address`` is where this thread has ``length`` bytes of
    the file ``ino`` from ``offset`` on mapped. All four are bytes and multiples of a page. ``simulated``: the
    media stays good (MF_SW_SIMULATED).
    """

    is_long = True

    tid: Tid
    address: Address
    ino: Ino
    offset: FileOffset
    length: Length
    soft: bool = False
    simulated: bool = False


class Attach(Request[Done], tag="attach", omit_defaults=True):
    """Forward the system calls of a ``daxemu run``, process ``pid``, as packets. Unsupported: not direct.
    ``descriptors`` of ``pid``: listener of seccomp(2), socket, its inode number; null: only ask. ``zone``:
    addresses for direct mappings, start and end. ``simulated``: failures by madvise(2) without poison."""

    pid: Pid
    descriptors: tuple[int, int, int] | None = None
    zone: tuple[Address, Address] = (0, 0)
    simulated: bool = False


class Clear(Request[Cleared], tag="clear"):
    """Clear the poison of ranges. The poisoned sectors can be read again; their bytes are lost, and read as
    zeros.
    """

    is_long = True

    ranges: list[tuple[int, int]]
    ino: Ino | None = None


class Settle(Request[Settled], tag="settle"):
    """Wait until each failure so far was handled and each of its signals is in an event: as delivered, or as
    pending for a process that is stopped. The error is Busy after ``patience`` seconds.
    """

    is_long = True

    patience: Seconds = 10.0


class Scrub(Request[Cleared], tag="scrub"):
    """Search the device for latent poison. The poison that is found becomes bad blocks."""

    is_long = True


class GetBadblocks(Request[BadblockList], tag="badblocks"):
    """List the bad blocks."""


class Damaged(Request[DamagedList], tag="damaged"):
    """List the damaged files and their ranges."""


class WhoMaps(Request[MappedFileList], tag="who_maps"):
    """List the mappings of files of the mount, by all processes that the supervisor may look into."""


class Map(Request[FileMap], tag="map"):
    """List the extents of a file."""

    ino: Ino


class Reflink(Request[Shared], tag="reflink"):
    """Share a range of the blocks of ``src`` with ``dst``; ``length`` 0 is to the end of ``src``."""

    is_long = True

    src: Ino
    dst: Ino
    src_offset: FileOffset = 0
    dst_offset: FileOffset = 0
    length: Length = 0


class Remove(Request[Removed], tag="remove"):
    """Remove the device while in use (surprise removal)."""

    is_long = True


class Status(Request[StatusReport], tag="status"):
    """Report the configuration, the state and the counters of the mount."""


class Internals(Request[InternalsReport], tag="internals"):
    """Report the supervisor's tasks and everything that waits. The supervisor writes the same to
    supervisor.log on SIGUSR1.
    """


class Survey(Request[SurveyReport], tag="survey"):
    """Map a range of the device, in at most ``cells`` equal parts and at most ``files`` files. ``length``
    null is to the end of the device.
    """

    is_long = True

    offset: DeviceOffset = 0
    length: Length | None = None
    cells: int = 1
    files: int = 0


class Set(Request[Done], tag="set"):
    """Change settings, as with sysctl(8): all of them or none."""

    is_long = True

    settings: dict[str, str]


class Repair(Request[Repaired], tag="repair"):
    """Have the repair strategy repair every bad block. With ``strategy`` (``NAME[:key=value,...]``), choose
    that strategy first.
    """

    is_long = True

    strategy: str | None = None


class FileRange(msgspec.Struct, forbid_unknown_fields=True):
    """Bytes of a file; ``length`` null is to the end of the file."""

    ino: Ino
    offset: FileOffset = 0
    length: Length | None = None


class Follow(Request[Never], tag="follow"):
    """Send the events with ``seq`` above ``after``, then each new event. The request has no other reply, and
    the connection takes no further request.

    ``events``: send only events of these names. With ``files``, ``ranges`` (device bytes) or ``pids``: send
    only events that concern one of these, and events that concern every process, such as a shutdown or a
    removal of the device.
    """

    after: int = 0
    events: list[str] | None = None
    files: list[FileRange] | None = None
    ranges: list[tuple[int, int]] | None = None
    pids: list[Pid] | None = None


class AddRule(Request[RuleAdded], tag="add_rule", omit_defaults=True):
    """Have ``then`` happen when an operation of a program matches ``on``. Without a ``name`` the rule gets
    one. ``seed``: of the probability in ``on``. Rules end with the mount.
    """

    on: On
    then: list[Action]
    name: str | None = None
    seed: int = 0


class ListRules(Request[RuleList], tag="rules"):
    """List the rules of the mount."""


class DeleteRules(Request[RuleList], tag="delete_rules"):
    """Delete rules by their names; without ``names``, all rules. The reply lists the deleted rules."""

    names: list[str] = []


class PowerFailed(msgspec.Struct):
    """``dropped``: number of changed inodes and directory entries that were lost. ``oldest``: age of the
    oldest lost change in seconds, null if no change was lost. Dirty pages of mappings are not counted: only
    the kernel knew them.
    """

    dropped: int
    oldest: float | None


class PowerFail(Request[PowerFailed], tag="powerfail"):
    """Lose power: the page cache, the uncommitted changes and the mount are gone. sync(1) and syncfs(2)
    commit nothing: the kernel does not forward them to FUSE.
    """


class Trace(Request[Never], tag="trace"):
    """Send an empty reply, then a record of each operation of a program and of each step of a failure
    (daxemu.trace_record). ``file``: a glob, for operations on these files only. As with ``follow``, the
    connection takes no further request.
    """

    file: str | None = None


class Unmount(Request[Done], tag="unmount"):
    """Unmount, and end the supervisor. With ``force``, also while files are open."""

    is_long = True

    force: bool = False


REQUEST_TYPES: tuple[type[Request[Any]], ...] = tuple(Request.__subclasses__())
"""Every class of requests, in the order of definition: the class is the only place that lists a request."""

if TYPE_CHECKING:
    AnyRequest = Request[Any]
else:
    AnyRequest = Union[REQUEST_TYPES]  # noqa: UP007

decode_request: Callable[[bytes | str], AnyRequest] = msgspec.json.Decoder(AnyRequest).decode


def reply_type(request: type[Request[R]]) -> type[R]:
    """Return the type of the reply to ``request``; Never for a request that is answered by events."""
    found: type[R] = get_args(request.__orig_bases__[0])[0]  # type: ignore[attr-defined]
    return found
