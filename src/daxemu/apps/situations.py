"""What is done to a program's memory: the columns of the matrix."""

from __future__ import annotations

from typing import Literal

import msgspec

Part = Literal["data", "journal", "device"]
Harm = Literal["none", "poison", "latent", "silent", "removal"]


class Situation(msgspec.Struct, frozen=True):
    """``live``: the program runs, has opened its data and read it all once; otherwise it is started after
    the harm.
    """

    name: str
    title: str
    about: str
    harm: Harm
    part: Part = "data"
    live: bool = False
    early_kill: bool = False


SITUATIONS = (
    Situation("healthy", "Nothing", "nothing is hurt: what the others are compared with", "none"),
    Situation(
        "before",
        "Before open",
        "a page of the data file is poison when the program opens it",
        "poison",
    ),
    Situation(
        "early",
        "Live, early kill",
        "a page of the data file goes bad under the running program, with early_kill=1",
        "poison",
        live=True,
        early_kill=True,
    ),
    Situation(
        "late",
        "Live, late kill",
        "a page of the data file goes bad under the running program, with early_kill=0, the default",
        "poison",
        live=True,
    ),
    Situation(
        "latent",
        "Latent",
        "the same, and nobody knows of it until the program reads everything again",
        "latent",
        live=True,
    ),
    Situation(
        "silent",
        "Silent",
        "16 bytes of one record in the data file are others when the program opens it: no error anywhere",
        "silent",
    ),
    Situation(
        "journal",
        "Journal",
        "a page of the journal is poison when the program starts after it was killed",
        "poison",
        part="journal",
    ),
    Situation(
        "journal-live",
        "Journal, live",
        "a page of the journal goes bad under the running program",
        "poison",
        part="journal",
        live=True,
    ),
    Situation(
        "journal-silent",
        "Journal, silent",
        "16 bytes of one record in the journal are others when the program starts after it was killed",
        "silent",
        part="journal",
    ),
    Situation(
        "remove",
        "Removal",
        "the device is removed under the running program; it is back, unhurt, before the restart",
        "removal",
        part="device",
        live=True,
    ),
)
BY_NAME = {situation.name: situation for situation in SITUATIONS}
