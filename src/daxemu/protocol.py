"""Requests and replies of the control socket, as types. One JSON object a line; ``op`` names the request.

docs/protocol.md is made of this file (``make protocol``). A request is a ``Request[R]``; ``R`` is what it is
answered with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Never, TypeVar, Union, get_args

import msgspec

from daxemu.errors import InvalidArgument
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

R = TypeVar("R", bound=msgspec.Struct)


class PoisonedRange(msgspec.Struct):
    """What one range of an injection did. Device bytes; ``pfn`` and ``nr_pages`` as memory_failure() saw
    it. ``signals``: SIGBUS sent, one for each mapping of each process that was chosen; ``processes``:
    distinct processes among their receivers. ``told`` is the old name of ``signals``.
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
    """Whether a range was rounded out to whole sectors."""
    holes: Length
    """Bytes of the ranges that are holes of the file: there is no media to poison."""


class Advised(msgspec.Struct):
    """What the system call returns: 0, or an error number. Any signal is on its way."""

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


class Extent(msgspec.Struct):
    """A run of a file, in bytes. ``device_offset`` null: a hole. ``shared_by``: files' links to it, 1 if its
    own.
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
    """``signals``, ``processes`` and ``told`` as in PoisonedRange. A removal sends each process one."""

    told: Signals
    was_idle: bool
    signals: Signals
    processes: Processes


class Cell(msgspec.Struct):
    """One of the equal parts of a range of the device, in bytes: in use, of that by the filesystem's own
    records and by more than one link, known to be poison, and poison that nobody knows of.
    """

    used: int = 0
    metadata: int = 0
    shared: int = 0
    bad: int = 0
    latent: int = 0


class FileUse(msgspec.Struct):
    """How much of a range a file has, and where its first byte there is."""

    ino: Ino
    path: str
    bytes: Length
    device_offset: DeviceOffset
    file_offset: FileOffset


class SurveyReport(msgspec.Struct):
    """``cell``: bytes of each part, whole pages; the last part may reach past the end of the device."""

    offset: DeviceOffset
    cell: Length
    cells: list[Cell]
    files: list[FileUse]
    """Those with the most of the range."""


class Progress(msgspec.Struct):
    """How much of what there is has been seen to."""

    done_bytes: Length
    total_bytes: Length


class RepairReport(msgspec.Struct):
    """``recovered`` to ``failed``: how many failures came out so. ``broken``: why the strategy is asked
    nothing more. ``progress``: how far it is, while it copies or adds up what was there before it was chosen.
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
    """What is left of what was bad, in blocks of 4096 bytes."""

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
    """Background scrubs so far."""
    settings: dict[str, str]
    counters: dict[str, int]
    repair: RepairReport
    events: int
    supplement: str
    tracer: str
    layouts: str = "off"
    """How many requests were answered without the filesystem (fs/layouts.py), or "off"."""


class Settled(msgspec.Struct):
    """``seconds``: how long that took."""

    seconds: Seconds


class InternalsReport(msgspec.Struct):
    """For people, a line an entry; the text of entries may change. ``layouts``: files with a layout out."""

    tasks: list[str]
    turns: list[str]
    """Failures under way."""
    held: list[str]
    """Requests that wait for the invalidate lock."""
    armed: list[str]
    """Threads that the tracer has a request for."""
    layouts: int

    def lines(self) -> list[str]:
        """Return the report as text for people."""
        lines = []
        for title in ("tasks", "turns", "held", "armed"):
            entries: list[str] = getattr(self, title)
            lines += [f"{title}: {len(entries)}", *(f"  {entry}" for entry in entries)]
        return [*lines, f"layouts out: {self.layouts} files"]


class Done(msgspec.Struct):
    """Nothing to tell but that it was done."""


class Reply(msgspec.Struct):
    """``ok``: ``result`` is the reply's struct. Otherwise ``error`` names one of errors.ERRORS and
    ``message`` says why.
    """

    ok: bool
    result: msgspec.Raw | None = None
    error: str | None = None
    message: str | None = None


class Request(msgspec.Struct, Generic[R], tag_field="op", forbid_unknown_fields=True):
    """One thing asked for."""

    is_long: ClassVar[bool] = False
    """Whether the supervisor may take minutes for the answer."""


class Inject(Request[Injected], tag="inject", omit_defaults=True):
    """Poison ranges of file ``ino``, or of the device if that is null. ``ranges``: [offset, length] in bytes,
    each one failure.
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
    """``madvise_inject_error()``: thread ``tid``, which waits in madvise(2), asks for pages to fail, one
    after another, or to go offline (``soft``). It has ``length`` bytes of file ``ino`` from ``offset`` on
    mapped at ``address``; these are multiples of a page. ``simulated``: the media stays good
    (MF_SW_SIMULATED).
    """

    is_long = True

    tid: Tid
    address: Address
    ino: Ino
    offset: FileOffset
    length: Length
    soft: bool = False
    simulated: bool = False


class Clear(Request[Cleared], tag="clear"):
    """Make ranges healthy again; what was in their poisoned sectors is zeros from then on."""

    is_long = True

    ranges: list[tuple[int, int]]
    ino: Ino | None = None


class Settle(Request[Settled], tag="settle"):
    """Answered once every failure so far was handled, and every signal of them is in an event: as delivered,
    or as pending for a process that is stopped. Busy after ``patience`` seconds.
    """

    is_long = True

    patience: Seconds = 10.0


class Scrub(Request[Cleared], tag="scrub"):
    """Look for latent poison; what is found is in badblocks then."""

    is_long = True


class GetBadblocks(Request[BadblockList], tag="badblocks"):
    """The bad sectors that are known."""


class Damaged(Request[DamagedList], tag="damaged"):
    """Files and ranges that lost data."""


class Map(Request[FileMap], tag="map"):
    """The extents of a file."""

    ino: Ino


class Reflink(Request[Shared], tag="reflink"):
    """Share a range of ``src``'s blocks with ``dst``; ``length`` 0 is to the end of ``src``."""

    is_long = True

    src: Ino
    dst: Ino
    src_offset: FileOffset = 0
    dst_offset: FileOffset = 0
    length: Length = 0


class Remove(Request[Removed], tag="remove"):
    """Surprise removal of the device."""

    is_long = True


class Status(Request[StatusReport], tag="status"):
    """What this machine is and how it fares."""


class Internals(Request[InternalsReport], tag="internals"):
    """The supervisor's tasks and everything that waits; also written to supervisor.log on SIGUSR1."""


class Survey(Request[SurveyReport], tag="survey"):
    """What is where in a range of the device (``length`` null: to its end), in at most ``cells`` parts and
    ``files`` names.
    """

    is_long = True

    offset: DeviceOffset = 0
    length: Length | None = None
    cells: int = 1
    files: int = 0


class Set(Request[Done], tag="set"):
    """Change settings, as a sysctl would: all of them or none."""

    is_long = True

    settings: dict[str, str]


class Repair(Request[Repaired], tag="repair"):
    """Choose another repair strategy (``NAME[:key=value,...]``), if any is given; then have it see to all
    that is bad.
    """

    is_long = True

    strategy: str | None = None


class FileRange(msgspec.Struct, forbid_unknown_fields=True):
    """Bytes of a file; ``length`` null is to its end."""

    ino: Ino
    offset: FileOffset = 0
    length: Length | None = None


class Follow(Request[Never], tag="follow"):
    """Send the events with ``seq`` above ``after``, then each new one: there is no other answer, and nothing
    else can be asked on this connection.

    ``events``: only those of these names. With ``files``, ``ranges`` (device bytes) or ``pids``: only those
    that concern one of them, and those that concern everybody, such as a shutdown or the device's removal.
    """

    after: int = 0
    events: list[str] | None = None
    files: list[FileRange] | None = None
    ranges: list[tuple[int, int]] | None = None
    pids: list[Pid] | None = None


class PowerFailed(msgspec.Struct):
    """Changed inodes and directory entries that were dropped, and the age of the oldest change in seconds
    (null if none was dropped). Dirty pages of mappings are not among them: only the kernel knew them.
    """

    dropped: int
    oldest: float | None


class PowerFail(Request[PowerFailed], tag="powerfail"):
    """The machine loses power: the page cache and what was not committed are gone, and with them the
    mount. sync(1) and syncfs(2) commit nothing: the kernel does not forward them to FUSE.
    """


class Unmount(Request[Done], tag="unmount"):
    """Unmount and end. With ``force`` although files are open."""

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
    """What a request is answered with; Never if by events."""
    found: type[R] = get_args(request.__orig_bases__[0])[0]  # type: ignore[attr-defined]
    return found
