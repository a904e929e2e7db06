"""Plans for the tests of evaluate."""

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
    """Return a plan with one workload and one fault process. The arguments are lines of TOML."""
    return parse(text_with(process, faults, top))


def text_with(process: str, faults: str = "", top: str = "") -> str:
    """Return the TOML text of :func:`plan_with`.

    ``process`` begins on line 8, plus the lines of ``top`` and ``faults``.
    """
    return (
        f'name = "p"\nstrategies = ["none", "mirror"]\n{top}[[workload]]\nkind = "kvstore"\n'
        f'[[faults]]\nname = "f"\n{faults}[[faults.process]]\n{process}\n'
    )
