"""Plans for these tests."""

from __future__ import annotations

from daxemu.evaluate.plan import Plan, parse

SMALL = """\
name = "small"
strategies = ["none"]
seconds = 0.4
repetitions = 2
device = "32M"
[[workload]]
kind = "dataset"
count = 64
record = 8192
[[faults]]
name = "pages"
[[faults.process]]
expected = 30
unit = { page = 0.7, row = 0.3 }
detect = "access"
"""


def plan_with(process: str, faults: str = "", top: str = "") -> Plan:
    """A plan of one workload and one fault process; the arguments are lines of TOML."""
    return parse(text_with(process, faults, top))


def text_with(process: str, faults: str = "", top: str = "") -> str:
    """See :func:`plan_with`. ``process`` begins on line 8, after as many lines as ``top`` and ``faults``
    have.
    """
    return (
        f'name = "p"\nstrategies = ["none", "mirror"]\n{top}[[workload]]\nkind = "kvstore"\n'
        f'[[faults]]\nname = "f"\n{faults}[[faults.process]]\n{process}\n'
    )
