"""Malformed input of every kind is refused in daxemu's own words: one line, with what was expected."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from daxemu import protocol
from daxemu.errors import DaxemuError, InvalidArgument, NotADevice
from daxemu.evaluate import plan
from daxemu.malformed import NOT_TOML, dotted, explain
from daxemu.pmem.device_dir import DeviceConfig, DeviceDir
from daxemu.repair import registry
from tests.evaluate.plans import SMALL
from tests.support.mount import daxemu
from tests.support.words import library_words


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    number: int = 0
    many: list[float] = []
    word: str = ""
    flag: bool = False


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    needed: int
    inner: Inner | None = None


@pytest.mark.parametrize(
    ("text", "where", "reason"),
    [
        ('{"needed": "x"}', "needed", "expected a whole number, found text"),
        ('{"needed": null}', "needed", "expected a whole number, found nothing"),
        ("{}", "", "'needed' is missing"),
        ('{"needed": 1, "x": 1}', "x", "unknown key 'x'"),
        ('{"needed": 1, "inner": 1}', "inner", "expected keys with values or nothing, found a whole number"),
        (
            '{"needed": 1, "inner": {"many": [1, true]}}',
            "inner.many[1]",
            "expected a number, found true or false",
        ),
        ('{"needed": 1, "inner": {"word": {}}}', "inner.word", "expected text, found keys with values"),
        ("[]", "", "expected keys with values, found a list"),
        ("{", "", "not JSON: expected one object in braces"),
        ("", "", "not JSON: expected one object in braces"),
    ],
)
def test_an_error_of_a_parser_is_explained(text: str, where: str, reason: str) -> None:
    with pytest.raises(msgspec.DecodeError) as refused:
        msgspec.json.decode(text, type=Outer)
    path, why = explain(refused.value)
    assert (dotted(path), why) == (where, reason)


def test_a_hook_keeps_its_words() -> None:
    assert explain(msgspec.ValidationError("a size is text - at `$.a`")) == (["a"], "a size is text")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON: expected one object in braces"),
        (b"\xff", "not JSON: expected one object in braces"),
        (b"[" * 100_000, "expected keys with values, found a list"),
        (b'{"op": "unmount", "force": "yes"}', "force: expected true or false, found text"),
        (b'{"op": "follow", "after": "yesterday"}', "after: expected a whole number, found text"),
        (b'{"op": "dance"}', "op: 'dance' is none of the possible values"),
        (b"{}", "'op' is missing"),
        (b'{"op": 7}', "op: expected text"),
        (b'{"op": "inject", "ranges": [[0]]}', "ranges[0]: expected a list of length 2"),
    ],
)
def test_a_malformed_request_is_explained(line: bytes, reason: str) -> None:
    with pytest.raises((msgspec.MsgspecError, UnicodeError, RecursionError)) as refused:
        protocol.decode_request(line)
    path, why = explain(refused.value)
    assert (f"{dotted(path)}: {why}" if path else why) == reason


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            "size = 16777216",
            'size = "x"',
            "is damaged: size is 'x', not a whole number; correct that",
        ),
        ("size = 16777216", "", "is damaged: size is missing; correct that line, or"),
        (
            "size = 16777216",
            "size = ",
            f"cannot be read: line 3 is {NOT_TOML};",
        ),
        ("size = 16777216", "size", f"cannot be read: line 3 is {NOT_TOML};"),
        ("size = 16777216", "[a", f"cannot be read: line 3 is {NOT_TOML};"),
        (
            "size = 16777216",
            "size = 1\nsize = 2",
            f"cannot be read: line 4 is {NOT_TOML};",
        ),
        ("size = 16777216", "a = " + "[" * 100_000, "cannot be read: nested too deeply; restore it, or"),
        ("size = 16777216", "\udcff", "cannot be read: not UTF-8 text; restore it, or"),
    ],
)
def test_a_malformed_device_toml_is_explained(tmp_path: Path, old: str, new: str, reason: str) -> None:
    DeviceDir.create(tmp_path / "d", DeviceConfig(16 << 20)).close()
    toml = tmp_path / "d" / "device.toml"
    text = toml.read_text()
    assert old in text
    toml.write_bytes(text.replace(old, new).encode(errors="surrogateescape"))
    with pytest.raises(NotADevice) as refused:
        DeviceDir.load(tmp_path / "d")
    assert str(refused.value).startswith(f"{toml} {reason}")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('name = "small"', 'name = "small', "p:1: not TOML: expected KEY = VALUE, or [TABLE]"),
        ("seconds = 0.4", 'seconds = "1"', "p:3: expected a number, found text"),
        ("seconds = 0.4", "seconds = 2020-01-01", "p:3: expected a number, found a date"),
        ("seconds = 0.4", "seconds = [", "p:4: not TOML: expected KEY = VALUE, or [TABLE]"),
        ("repetitions = 2", "repetitions = 2.5", "p:4: expected a whole number, found a number"),
        ('"dataset"', '"datasett"', "p:7: 'datasett' is none of the possible values"),
    ],
)
def test_a_malformed_plan_is_explained(old: str, new: str, reason: str) -> None:
    assert old in SMALL
    with pytest.raises(InvalidArgument) as refused:
        plan.parse(SMALL.replace(old, new), "p")
    assert str(refused.value) == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("parity:data=x", "data=x: expected a whole number; its options are: "),
        ("parity:colour=red", "unknown key 'colour'; its options are: "),
        ("parity:=", "unknown key ''; its options are: "),
        ("none:x=1", "unknown key 'x'; its options are: none"),
        ("mirror:mapped=7", "mapped=7: '7' is none of the possible values; its options are: "),
    ],
)
def test_a_malformed_strategy_is_explained(text: str, reason: str) -> None:
    with pytest.raises(DaxemuError) as refused:
        registry.parse(text)
    assert str(refused.value).startswith(f"--repair {text}: {reason}")
    assert library_words(str(refused.value)) is None


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            "evaluate PLAN -o OUT -j x",
            "Invalid value for '-j' / '--jobs': 'x': expected a whole number from 1",
        ),
        (
            "evaluate PLAN -o OUT -j 0",
            "Invalid value for '-j' / '--jobs': 0: expected a whole number from 1",
        ),
        ("fleet PLAN --years 0", "Invalid value for '--years': 0.0: expected a number above 0."),
        ("fleet PLAN --years x", "Invalid value for '--years': 'x': expected a number above 0."),
        ("fleet PLAN --costs TEXT", "TEXT: not JSON: expected one object in braces: give a REPORT.json of"),
        ("fleet PLAN --costs LIST", "LIST: no key 'cells': give a REPORT.json of"),
        ("settle M --timeout x", "Invalid value for '--timeout': 'x': expected a number."),
        ("inject M --silent --seed x", "Invalid value for '--seed': 'x': expected a whole number."),
        (
            "mkfs D --size x",
            "Invalid value for '--size': 'x' is not a size: give bytes, or a number",
        ),
        ("mkfs D --size 1G --base-pfn x", "Invalid value for --base-pfn: 'x' is not a page frame number."),
        ("doctor x", "Got unexpected extra argument (x)."),
    ],
)
def test_a_malformed_option_is_explained(tmp_path: Path, words: str, reason: str) -> None:
    made = {"PLAN": SMALL, "TEXT": "Expecting value", "LIST": json.dumps([1])}
    for name, text in made.items():
        (tmp_path / name).write_text(text)
    paths = {name: str(tmp_path / name) for name in (*made, "OUT", "M", "D")}
    said = daxemu(*(paths.get(word, word) for word in words.split()), status=2)
    for name in made:
        reason = reason.replace(f"{name}:", f"{paths[name]}:")
    assert said.startswith(f"daxemu: {reason}"), said
    assert said.count("\n") == 1
