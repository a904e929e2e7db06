"""Repair strategies by name: built-in, from entry points (group ``daxemu.repair``), or from Python files."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import msgspec

from daxemu.errors import InvalidArgument
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.reserved import ReservedFile
from daxemu.malformed import explain
from daxemu.private_path import PrivatePath
from daxemu.repair.arrays import discard
from daxemu.repair.strategy import Options, Strategy

GROUP = "daxemu.repair"
MAPPED = "mapped"
"""Array with a mark for each block of ``Filesystem.mapped_stores``."""
INCOMPLETE = "incomplete"
"""The file that is there while what is kept for repair is not complete."""
OWN = {
    "none": "none:NoRepair",
    "zero": "zero:Zero",
    "punch": "punch:Punch",
    "quarantine": "quarantine:Quarantine",
    "mirror": "mirror:Mirror",
    "parity": "parity:Parity",
    "async-parity": "async_parity:AsyncParity",
    "reread": "reread:Reread",
    "fence": "fence:Fence",
}
"""Module and class of each built-in strategy.

The module is imported when the strategy is chosen, because some need numpy.
"""


def names() -> list[str]:
    """Return the names of all strategies, built-in and of other packages."""
    return sorted({*OWN, *(point.name for point in entry_points(group=GROUP))})


def find(name: str) -> type[Strategy]:
    """Return the strategy called ``name``.

    Raises InvalidArgument if no such strategy exists or can be loaded.
    """
    if name.endswith(".py"):
        return _in_file(Path(name))
    if name in OWN:
        module, _, attribute = OWN[name].partition(":")
        found: type[Strategy] = getattr(import_module(f"daxemu.repair.{module}"), attribute)
        return found
    for point in entry_points(group=GROUP, name=name):
        try:
            loaded: type[Strategy] = point.load()
        except Exception as error:
            raise InvalidArgument(f"the repair strategy {name} cannot be loaded: {_named(error)}") from error
        return loaded
    raise InvalidArgument(f"no repair strategy {name!r}; known strategies: {', '.join(names())}")


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _in_file(path: Path) -> type[Strategy]:
    """Return the strategy defined in a Python file.

    Raises InvalidArgument unless the file defines exactly one.
    """
    spec = spec_from_file_location(f"daxemu_strategy_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InvalidArgument(f"the repair strategy {path} cannot be loaded: {_named(error)}") from error
    found = [
        each
        for each in vars(module).values()
        if isinstance(each, type) and Strategy in each.__mro__ and each.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise InvalidArgument(f"{path} defines {len(found)} repair strategies; must be exactly one")
    strategy: type[Strategy] = found[0]
    return strategy


def parse(text: str) -> tuple[type[Strategy], Options]:
    """Return strategy and options for ``NAME[:key=value,...]`` or ``FILE.py[:key=value,...]``.

    Raises InvalidArgument for an unknown strategy or option, or a value out of range.
    """
    name, _, rest = text.partition(":")
    strategy = find(name)
    wanted: dict[str, str] = {}
    for word in rest.split(",") if rest else ():
        key, equals, value = word.partition("=")
        if not equals or key in wanted:
            raise InvalidArgument(f"--repair {text}: {word!r} is not key=value, or is given twice")
        wanted[key] = value
    try:
        options = msgspec.convert(wanted, strategy.Options, strict=False)
        options.validate()
        return strategy, options
    except msgspec.ValidationError as error:
        known = ", ".join(field.name for field in msgspec.structs.fields(strategy.Options)) or "none"
        path, reason = explain(error)
        key = str(path[-1]) if path else ""
        found = f"{key}={wanted[key]}: " if key in wanted and "unknown" not in reason else ""
        reason = reason.removesuffix(", found text")  # every value is text on the command line
        raise InvalidArgument(f"--repair {text}: {found}{reason}; its options are: {known}") from error


def forget(
    fs: Filesystem, root: PrivatePath, *, keep: PrivatePath | None = None, kind: type[Strategy] | None = None
) -> Iterator[None]:
    """Delete stale repair data. Data stored by a strategy that was not attached is out of date.

    ``keep``: a directory to keep. The reserved file stays if ``keep`` exists and ``kind`` uses the reserved
    file. Yields between two pieces.
    """
    for name in root.names() if root.exists() else ():
        is_kept = name == MAPPED and keep is not None and keep.exists()
        if root / name != keep and name != INCOMPLETE and not is_kept:
            yield from discard(root / name)
    if keep is None or not keep.exists() or kind is None or not kind.has_copies:
        yield from ReservedFile(fs).discard_in_pieces()
