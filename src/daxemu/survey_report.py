"""Reply of the request ``survey``: the use of a range of the device, in equal parts and by file."""

from __future__ import annotations

import msgspec

from daxemu.fields import DeviceOffset, FileOffset, Ino, Length


class Cell(msgspec.Struct):
    """Equal part of a range of the device; all counts in bytes. ``used``: bytes in use.
    ``metadata``: used bytes that hold the filesystem's own records. ``shared``: used bytes with more than one
    link. ``bad``: bytes in bad blocks. ``latent``: bytes of latent poison.
    """

    used: int = 0
    metadata: int = 0
    shared: int = 0
    bad: int = 0
    latent: int = 0


class FileUse(msgspec.Struct):
    """Use of a range of the device by one file. ``bytes``: bytes of the range in the file.
    ``device_offset`` and ``file_offset``: place of the first such byte.
    """

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
    """The files with the most bytes in the range."""
