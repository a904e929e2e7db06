"""Kinds of failures: one declaration for the protocol, the command line and plans."""

from __future__ import annotations

import msgspec
import pytest

from daxemu import protocol as p
from daxemu.cli.poison import inject
from daxemu.errors import InvalidArgument
from daxemu.evaluate.plan import parse
from daxemu.failure_kind import INJECTED, FailureKind, injected_kind
from tests.evaluate.plans import SMALL

RANGES = [(0, 4096)]


def asked(**fields: object) -> p.Inject:
    request = p.decode_request(msgspec.json.encode({"op": "inject", "ranges": RANGES, **fields}))
    assert isinstance(request, p.Inject)
    return request


@pytest.mark.parametrize("kind", INJECTED)
def test_a_request_names_a_kind_by_its_name_and_by_the_old_booleans(kind: FailureKind) -> None:
    assert asked(kind=kind.value).failure_kind is kind
    assert asked(**p.kind_fields(kind)).failure_kind is kind


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, FailureKind.POISON),
        ({"latent": False, "silent": False}, FailureKind.POISON),
        ({"latent": True, "silent": False}, FailureKind.LATENT),
        ({"silent": True, "seed": 7}, FailureKind.SILENT),
        ({"latent": True, "silent": True}, FailureKind.SILENT),
    ],
    ids=str,
)
def test_requests_of_earlier_clients_keep_their_meaning(fields: dict[str, object], kind: FailureKind) -> None:
    assert asked(**fields).failure_kind is kind


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"kind": "removal"}, "'removal' is no kind of injection: kinds are poison, latent, silent"),
        ({"kind": "poison", "latent": True}, "kind is poison, but latent is true: give one of them"),
        ({"kind": "silent", "latent": True}, "kind is silent, but latent is true: give one of them"),
    ],
    ids=str,
)
def test_a_request_that_contradicts_itself_is_refused(fields: dict[str, object], why: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{why}$"):
        _ = asked(**fields).failure_kind


def test_an_injection_is_sent_as_supervisors_of_earlier_versions_know_it() -> None:
    sent = p.Inject(RANGES, **p.kind_fields(FailureKind.LATENT))
    assert msgspec.json.decode(msgspec.json.encode(sent)) == {
        "op": "inject",
        "ranges": [[0, 4096]],
        "latent": True,
    }


@pytest.mark.parametrize(
    ("outcome", "kind"),
    [
        ("Recovered", FailureKind.POISON),
        ("latent", FailureKind.LATENT),
        ("silent", FailureKind.SILENT),
    ],
)
def test_the_outcome_of_a_range_tells_its_kind(outcome: str, kind: FailureKind) -> None:
    assert p.PoisonedRange(0, 512, 0, 1, outcome, 0, 0, 0).kind is kind


def test_the_command_line_has_an_option_for_each_kind_but_the_default() -> None:
    flags = {name for option in inject.params if getattr(option, "is_flag", False) for name in option.opts}
    assert flags - {"--json", "--after", "--of-file"} == {
        f"--{kind}" for kind in INJECTED if kind is not FailureKind.POISON
    }


def test_a_plan_says_how_it_names_latent_poison() -> None:
    faults = SMALL.replace("[[faults.process]]", '[[faults.process]]\nkind = "latent"', 1)
    with pytest.raises(InvalidArgument, match='latent is kind = "poison" with detect = "access"'):
        parse(faults)


def test_a_word_is_a_kind_of_injection_or_refused() -> None:
    assert injected_kind("latent") is FailureKind.LATENT
    with pytest.raises(InvalidArgument, match="'lost' is no kind of injection"):
        injected_kind("lost")
