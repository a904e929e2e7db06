"""Kinds of failures: how memory fails, and what is the same for all code that handles a kind.

A new kind is a member here, the change to the media (pmem/inject), its event, and the supervisor's branch.
Options, requests, plans and reports take their words and rules from the member.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from daxemu.errors import InvalidArgument


class Traits(NamedTuple):
    """Rules of a kind."""

    is_poison: bool = False
    """The media cannot be read. Poison takes whole sectors, and pages lose their mappings."""
    whole_device: bool = False
    """The device fails as a whole, by the request ``remove``. No range is injected."""
    option: str = ""
    """Help of the option of ``daxemu inject``; empty for the default and for kinds without a range."""
    done: str = "poisoned"
    """Participle for ``daxemu inject``."""
    instead: str = ""
    """Fields of a plan that give this kind; empty if ``kind`` of a plan does."""


class FailureKind(StrEnum):
    """Kind of memory failure. The value is the word in JSON, options, plans and reports."""

    POISON = "poison", Traits(is_poison=True)
    """Poison reported at once: bad blocks, memory_failure(), signals."""
    LATENT = (
        "latent",
        Traits(
            is_poison=True,
            option="Undetected poison: no signal and no bad block until it is loaded, read or scrubbed.",
            instead='kind = "poison" with detect = "access", "delay" or "scrub"',
        ),
    )
    """Poison that no software has seen yet."""
    SILENT = (
        "silent",
        Traits(option="Change the bytes without poison: reads succeed with wrong data.", done="changed"),
    )
    """Changed bytes; reads succeed."""
    REMOVAL = "removal", Traits(whole_device=True)
    """Surprise removal of the device."""

    traits: Traits

    def __new__(cls, value: str, traits: Traits) -> FailureKind:
        kind = str.__new__(cls, value)
        kind._value_ = value
        kind.traits = traits
        return kind

    @classmethod
    def of_outcome(cls, outcome: str) -> FailureKind:
        """Return the kind of an injected range by its ``outcome``: a kind or an Outcome."""
        return next((kind for kind in cls if kind == outcome), cls.POISON)

    @property
    def words(self) -> str:
        """Options of ``daxemu inject`` for this kind, after a space; empty for the default."""
        return f" --{self}" if self.traits.option else ""


INJECTED = tuple(kind for kind in FailureKind if not kind.traits.whole_device)
"""Kinds with a range, which the request ``inject`` accepts."""


def injected_kind(word: str) -> FailureKind:
    """Return the kind with a name. Raises InvalidArgument unless a range can be injected with the kind."""
    found = next((kind for kind in INJECTED if kind == word), None)
    if found is None:
        raise InvalidArgument(f"{str(word)!r} is no kind of injection: kinds are {', '.join(INJECTED)}")
    return found
