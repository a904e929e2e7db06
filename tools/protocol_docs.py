"""docs/protocol.md, made of the message types and events: python -m tools.protocol_docs > docs/protocol.md"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import msgspec

from daxemu import fields
from daxemu import protocol as p
from daxemu.errors import ERRORS
from daxemu.events import EVENT_TYPES, Event

TOP = Path(__file__).parents[1]
_COMMON = ("seq", "time")
_PLAIN = {
    "None": "null",
    **{
        name: kind.__origin__.__name__ for name, kind in vars(fields).items() if hasattr(kind, "__metadata__")
    },
}
"""The plain type of each unit type."""


def page() -> str:
    """The whole page."""
    text = (TOP / "tools" / "protocol.md.in").read_text()
    for name, made in (
        ("{errors}", ", ".join(f"`{name}`" for name in ERRORS)),
        ("{example}", (TOP / "examples" / "told.c").read_text()),
        ("{requests}", "\n".join(_block(_request(kind)) for kind in p.REQUEST_TYPES)),
        ("{events}", "\n".join(_block(_event(event)) for event in EVENT_TYPES)),
    ):
        text = text.replace(name, made)
    return text


def _block(lines: Iterator[str]) -> str:
    return "\n".join(lines).rstrip() + "\n"


def _request(kind: type[p.Request[msgspec.Struct]]) -> Iterator[str]:
    yield f"### {kind.__struct_config__.tag}\n"
    yield _prose(kind)
    yield from _fields(kind)
    if kind.__struct_fields__:
        yield ""
    answer = p.reply_type(kind)
    if answer.__name__ == "Never":
        return
    prose = _prose(answer)
    yield f"Answer{': ' + prose if prose else ':'}"
    yield from _fields(answer)


def _event(kind: type[Event]) -> Iterator[str]:
    yield f"### {kind.__name__}\n"
    if prose := _prose(kind):
        yield prose
    yield from _fields(kind)


def _prose(kind: type) -> str:
    text = inspect.cleandoc(kind.__dict__.get("__doc__") or "").replace("``", "`")
    return "\n\n".join(textwrap.fill(" ".join(part.split()), 150) for part in text.split("\n\n"))


def _fields(kind: type[msgspec.Struct], depth: int = 0) -> Iterator[str]:
    notes, units = _notes(kind), fields.declared(kind)
    if not depth:
        yield ""
    for field in msgspec.structs.fields(kind):
        if field.name in _COMMON and issubclass(kind, Event):
            continue
        default = "" if field.required else f", default `{_json(_default(field))}`"
        note = f": {notes[field.name]}" if field.name in notes else ""
        declared = _plain(str(inspect.get_annotations(kind)[field.name]))
        unit = f" ({units[field.name]})" if field.name in units else ""
        yield f"{'    ' * depth}- `{field.name}`: `{declared}`{unit}{default}{note}"
        for part in _structs(field.type):
            config = part.__struct_config__
            tag = f"with `{config.tag_field}` `{config.tag}`: " if config.tag else ""
            if prose := _prose(part):
                yield f"{'    ' * (depth + 1)}- {tag}{' '.join(prose.split())}"
            yield from _fields(part, depth + 1)


def _plain(declared: str) -> str:
    """Return a declared type with its unit types and None as JSON has them."""
    return re.sub(r"\w+", lambda word: _PLAIN.get(word[0], word[0]), declared)


def _structs(kind: object) -> Iterator[type[msgspec.Struct]]:
    """Return the structs within a type."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        yield kind
    for argument in getattr(kind, "__args__", ()):
        yield from _structs(argument)


def _notes(kind: type) -> dict[str, str]:
    """Return the strings below the fields in the source, by field."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(field.target, ast.Name)
            assert isinstance(below.value, ast.Constant)
            found[field.target.id] = " ".join(str(below.value.value).split()).replace("``", "`")
    return found


def _default(field: msgspec.structs.FieldInfo) -> object:
    """Return the default of a field that is not required."""
    return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


if __name__ == "__main__":
    print(page(), end="")
