"""Situations: the columns of the matrix. A situation says which memory of a program fails, and when."""

from __future__ import annotations

from typing import Literal

import msgspec

Part = Literal["data", "journal", "device"]
Harm = Literal["none", "poison", "latent", "silent", "removal"]


class Situation(msgspec.Struct, frozen=True):
    """Situation of a program.

    ``live``: the program runs, and has opened and read all its data, before the harm. Otherwise the program
    is started after the harm.
    """

    name: str
    title: str
    about: str
    harm: Harm
    part: Part = "data"
    live: bool = False
    early_kill: bool = False


SITUATIONS = (
    Situation("healthy", "Nothing", "no injection: the reference for all other columns", "none"),
    Situation(
        "before",
        "Before open",
        "a page of the data file is poisoned when the program opens the file",
        "poison",
    ),
    Situation(
        "early",
        "Live, early kill",
        "a page of the data file is poisoned under the running program, with early_kill=1",
        "poison",
        live=True,
        early_kill=True,
    ),
    Situation(
        "late",
        "Live, late kill",
        "a page of the data file is poisoned under the running program, with early_kill=0, the default",
        "poison",
        live=True,
    ),
    Situation(
        "latent",
        "Latent",
        "the same with latent poison: undetected until the program reads everything again",
        "latent",
        live=True,
    ),
    Situation(
        "silent",
        "Silent",
        "16 bytes of one record in the data file are changed before the program opens it, without an error",
        "silent",
    ),
    Situation(
        "journal",
        "Journal",
        "a page of the journal is poisoned when the program starts after a kill",
        "poison",
        part="journal",
    ),
    Situation(
        "journal-live",
        "Journal, live",
        "a page of the journal is poisoned under the running program",
        "poison",
        part="journal",
        live=True,
    ),
    Situation(
        "journal-silent",
        "Journal, silent",
        "16 bytes of one record in the journal are changed when the program starts after a kill",
        "silent",
        part="journal",
    ),
    Situation(
        "remove",
        "Removal",
        "the device is removed under the running program, and put back undamaged before the restart",
        "removal",
        part="device",
        live=True,
    ),
)
BY_NAME = {situation.name: situation for situation in SITUATIONS}
