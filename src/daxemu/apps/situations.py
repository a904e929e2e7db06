"""Situations: the columns of the matrix. A situation says which memory of a program fails, and when."""

from __future__ import annotations

from typing import Literal

import msgspec

from daxemu.failure_kind import FailureKind

Part = Literal["data", "journal", "device"]


class Situation(msgspec.Struct, frozen=True):
    """Situation of a program.

    ``live``: the program runs, and has opened and read all its data, before the harm. Otherwise the program
    is started after the harm.
    """

    name: str
    title: str
    about: str
    harm: FailureKind | None = None
    part: Part = "data"
    live: bool = False
    early_kill: bool = False


SITUATIONS = (
    Situation("healthy", "Nothing", "no injection: the reference for all other columns"),
    Situation(
        "before",
        "Before open",
        "a page of the data file is poisoned when the program opens the file",
        FailureKind.POISON,
    ),
    Situation(
        "early",
        "Live, early kill",
        "a page of the data file is poisoned under the running program, with early_kill=1",
        FailureKind.POISON,
        live=True,
        early_kill=True,
    ),
    Situation(
        "late",
        "Live, late kill",
        "a page of the data file is poisoned under the running program, with early_kill=0, the default",
        FailureKind.POISON,
        live=True,
    ),
    Situation(
        "latent",
        "Latent",
        "the same with latent poison: undetected until the program reads everything again",
        FailureKind.LATENT,
        live=True,
    ),
    Situation(
        "silent",
        "Silent",
        "16 bytes of one record in the data file are changed before the program opens it, without an error",
        FailureKind.SILENT,
    ),
    Situation(
        "journal",
        "Journal",
        "a page of the journal is poisoned when the program starts after a kill",
        FailureKind.POISON,
        part="journal",
    ),
    Situation(
        "journal-live",
        "Journal, live",
        "a page of the journal is poisoned under the running program",
        FailureKind.POISON,
        part="journal",
        live=True,
    ),
    Situation(
        "journal-silent",
        "Journal, silent",
        "16 bytes of one record in the journal are changed when the program starts after a kill",
        FailureKind.SILENT,
        part="journal",
    ),
    Situation(
        "remove",
        "Removal",
        "the device is removed under the running program, and put back undamaged before the restart",
        FailureKind.REMOVAL,
        part="device",
        live=True,
    ),
)
BY_NAME = {situation.name: situation for situation in SITUATIONS}
