"""Requests and replies of the control socket, as types. One JSON object a line; ``op`` names the request."""

from __future__ import annotations

from typing import Literal

import msgspec

from daxemu.uapi import Ino


class Request(msgspec.Struct, tag_field="op", forbid_unknown_fields=True):
    """One thing asked for."""


class Inject(Request, tag="inject"):
    """Poison ranges of file ``ino``, or of the device if that is null. ``ranges``: [offset, length] in bytes,
    each one failure.
    """

    ranges: list[tuple[int, int]]
    ino: Ino | None = None
    latent: bool = False


class Madvise(Request, tag="madvise"):
    """``madvise_inject_error()``: thread ``tid``, which waits in madvise(2), asks for pages to fail, one
    after another, or to go offline (``soft``). It has ``length`` bytes of file ``ino`` from ``offset`` on
    mapped at ``address``; these are multiples of a page. ``simulated``: the media stays good
    (MF_SW_SIMULATED).
    """

    tid: int
    address: int
    ino: Ino
    offset: int
    length: int
    soft: bool = False
    simulated: bool = False


class Clear(Request, tag="clear"):
    """Make ranges healthy again; what was in their poisoned sectors is zeros from then on."""

    ranges: list[tuple[int, int]]
    ino: Ino | None = None


class Scrub(Request, tag="scrub"):
    """Look for latent poison; what is found is in badblocks then."""


class GetBadblocks(Request, tag="badblocks"):
    """The bad sectors that are known."""


class Damaged(Request, tag="damaged"):
    """Files and ranges that lost data."""


class Map(Request, tag="map"):
    """The extents of a file."""

    ino: Ino


class Reflink(Request, tag="reflink"):
    """Share a range of ``src``'s blocks with ``dst``; ``length`` 0 is to the end of ``src``."""

    src: Ino
    dst: Ino
    src_offset: int = 0
    dst_offset: int = 0
    length: int = 0


class Remove(Request, tag="remove"):
    """Surprise removal of the device."""


class Status(Request, tag="status"):
    """What this machine is and how it fares."""


class Set(Request, tag="set"):
    """Change settings, as a sysctl would: all of them or none."""

    settings: dict[str, str]


class Follow(Request, tag="follow"):
    """Send the events with ``seq`` above ``after``, then each new one. Nothing else can be asked on this
    connection.
    """

    after: int = 0


class PowerFail(Request, tag="powerfail"):
    """The machine loses power: the page cache and what was not committed are gone, and with them the
    mount.
    """


class Unmount(Request, tag="unmount"):
    """Unmount and end. With ``force`` although files are open."""

    force: bool = False


AnyRequest = (
    Inject
    | Madvise
    | Clear
    | Scrub
    | GetBadblocks
    | Damaged
    | Map
    | Reflink
    | Remove
    | Status
    | Set
    | Follow
    | PowerFail
    | Unmount
)


class PoisonedRange(msgspec.Struct):
    """What one range of an injection did. Device bytes; ``pfn`` and ``nr_pages`` as memory_failure() saw
    it.
    """

    offset: int
    length: int
    pfn: int
    nr_pages: int
    outcome: str
    told: int


class Injected(msgspec.Struct):
    ranges: list[PoisonedRange]
    rounded: bool
    """Whether a range was rounded out to whole sectors."""
    holes: int
    """Bytes of the ranges that are holes of the file: there is no media to poison."""


class Advised(msgspec.Struct):
    """What the system call returns: 0, or an error number. Any signal is on its way."""

    errno: int


class Cleared(msgspec.Struct):
    ranges: list[tuple[int, int]]
    bytes: int


class BadblockList(msgspec.Struct):
    """``ranges``: [first sector, count], 512-byte sectors of the device."""

    ranges: list[tuple[int, int]]
    sectors: int


class DamagedRange(msgspec.Struct):
    ino: Ino
    path: str
    offset: int
    length: int


class DamagedList(msgspec.Struct):
    files: list[DamagedRange]


class Extent(msgspec.Struct):
    """A run of a file, in bytes. ``device_offset`` null: a hole. ``shared_by``: files' links to it, 1 if its
    own.
    """

    offset: int
    length: int
    device_offset: int | None
    pfn: int | None
    shared_by: int
    poisoned: bool


class FileMap(msgspec.Struct):
    ino: Ino
    path: str
    size: int
    extents: list[Extent]


class Shared(msgspec.Struct):
    bytes: int


class Removed(msgspec.Struct):
    told: int
    was_idle: bool


class StatusReport(msgspec.Struct):
    device: str
    mountpoint: str
    pid: int
    state: Literal["mounted", "shut down", "removed"]
    reason: str | None
    size: int
    base_pfn: int
    struct_pages: bool
    blocks: int
    free_blocks: int
    inodes: int
    extents: int
    open_files: int
    badblocks: int
    poisoned_sectors: int
    settings: dict[str, str]
    counters: dict[str, int]
    events: int
    supplement: str
    tracer: str


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


decode_request = msgspec.json.Decoder(AnyRequest).decode
