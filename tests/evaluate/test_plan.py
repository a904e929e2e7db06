"""Plans: refused values, and the line in the error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from daxemu.errors import InvalidArgument
from daxemu.evaluate.plan import Plan, load, mean_faults, parse
from daxemu.evaluate.plan_lines import line_of
from tests.evaluate.plans import SMALL, plan_with, text_with


def refusal(text: str) -> tuple[int, str]:
    """Return the line and the reason of a refused plan."""
    with pytest.raises(InvalidArgument) as refused:
        parse(text, "p.toml")
    found = re.fullmatch(r"p\.toml:(\d+): (.+)", str(refused.value))
    assert found, refused.value
    return int(found[1]), found[2]


@pytest.mark.parametrize(
    ("process", "line", "why"),
    [
        ("expected = 1\nrat = 2", 9, "unknown key 'rat'"),
        ("rate = 1\nexpected = 1", 9, "exactly one of"),
        ("unit = { page = 1 }", 7, "exactly one of"),
        ('expected = 1\nkind = "poisonous"', 9, "poisonous"),
        ('expected = 1\nspread = "4Q"', 9, "'4Q' is not a size"),
        ("expected = 1\nspread = true", 9, "a size is"),
        ("rate = 1\nacceleration = 1e15", 8, "do not fit: 200 a second"),
        ("fit_per_mbit = 1e12\nacceleration = 1e9", 8, "do not fit"),
        ("expected = -1", 8, "above 0"),
        ("expected = 1\nacceleration = 10", 9, "this process has neither"),
        ("expected = 1\npareto = 1.0", 9, "a Pareto shape is above 1"),
        ('expected = 1\ndetect = "scrub"', 9, "needs the fault plan's scrub_period"),
        ('expected = 1\ndetect = "delay"', 9, "go together"),
        ("expected = 1\ndelay = 0.5", 9, "go together"),
        ('expected = 1\ndetect = "delay"\ndelay = 0', 10, "delay is above 0"),
        ('arrival = "at"\ntimes = [0.5, 99.0]', 9, "a time outside the trial"),
        ('arrival = "at"', 8, "needs times"),
        ('arrival = "at"\ntimes = [1]\nrate = 1', 10, "times gives the number"),
        ("expected = 1\ntimes = [1]", 9, "times needs arrival"),
        ('expected = 1\nkind = "silent"\ndetect = "access"', 10, "silent is not poison"),
        ('expected = 1\nkind = "removal"\ntarget = "device"', 10, "removal takes the whole device"),
        ('expected = 1\ntarget = "metadata"\nunit = { bank = 1 }', 10, "larger than the metadata"),
        ("expected = 1\nunit = { chip = 1 }", 9, "no unit 'chip'"),
        ("expected = 1\nunit = { page = 0 }", 9, "add up to 0"),
        ("expected = 1\nunit = { page = -1 }", 9, "negative"),
        ("expected = 1\nspill = 100", 9, "a number of whole pages"),
        ('expected = 1\narrival = "storm"\nburst = 0.5', 10, "burst >= 1"),
    ],
)
def test_an_invalid_fault_process_is_refused(process: str, line: int, why: str) -> None:
    at, said = refusal(text_with(process))
    assert why in said
    assert at == line


@pytest.mark.parametrize(
    ("old", "new", "line", "why"),
    [
        ('name = "small"', "nme = 1", 1, "unknown key 'nme'"),
        ('name = "small"', 'name = "small', 1, ""),
        ("seconds = 0.4", 'seconds = "1"', 3, "expected a number"),
        ("seconds = 0.4", "seconds = 0", 3, "more than 0"),
        ("repetitions = 2", "repetitions = 0", 4, "at least one"),
        ('"32M"', '"1M"', 5, "at least 16M"),
        ('"32M"', "40000001", 5, "in whole pages"),
        ('["none"]', '["mirror"]', 2, "the baseline 'none'"),
        ('["none"]', '["none", "none"]', 2, "twice"),
        ('"dataset"', '"datasett"', 7, "datasett"),
        ("count = 64", "count = 0", 8, "1 or more"),
        ("count = 64", "count = 64000", 7, "more than a quarter"),
        ("count = 64", "size = 1", 8, "unknown key 'size'"),
        ('name = "pages"', 'name = ""', 11, "needs a name"),
        ('name = "pages"', 'name = "pages"\nscrub_period = 0.001', 12, "at least 0.05 seconds"),
        ('name = "pages"', 'name = "pages"\nrow = 100', 12, "must fit the device"),
        ('name = "pages"', 'name = "pages"\n[[faults]]\nname = "pages"', 12, "two of faults"),
        ("expected = 30", "expected = 30\n[fleet]\nyears = 0", 14, "a fleet has"),
    ],
)
def test_an_invalid_plan_is_refused(old: str, new: str, line: int, why: str) -> None:
    assert old in SMALL
    text = SMALL.replace(old, new)
    if "[fleet]" in new:
        text = text.partition("unit =")[0]
    at, said = refusal(text)
    assert why in said
    assert at == line


def test_an_impossible_model_is_refused() -> None:
    at, said = refusal(SMALL + "[fleet.model.mine]\ngroup = 1\ntolerates = 1\n")
    assert (at, said) == (16, "tolerates is 0 or 1, and less than group")


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="No such file"):
        load(tmp_path / "plan.toml")
    (tmp_path / "bad").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidArgument, match="not UTF-8"):
        load(tmp_path / "bad")


def test_line_of_finds_nested_tables_and_the_nearest_parent() -> None:
    text = "a = 1\n[[t]]\nx = 1\n[[t.u]]\ny = 1\n[[t.u]]\ny = 2\n[[t]]\n[t.v]\nz.w = 3\n"
    assert line_of(text, ["t", 0, "u", 1, "y"]) == 7
    assert line_of(text, ["t", 1, "v", "z", "w"]) == 10
    assert line_of(text, ["t", 1, "nothing"]) == 8
    assert line_of(text, ["nothing"]) == 1


def test_rates_are_per_year_and_accelerated() -> None:
    def mean(process: str) -> float:
        plan = plan_with(process, top="seconds = 2.0\n")
        return mean_faults(plan, plan.faults[0].process[0])

    assert mean("rate = 1\nacceleration = 31557600.0") == pytest.approx(2.0)
    # 64 MiB are 512 Mbit: 1000 FIT each, for 2 accelerated seconds.
    assert mean("fit_per_mbit = 1000\nacceleration = 1e6") == pytest.approx(1e-6 * 512 * 2e6 / 3600)
    assert mean('arrival = "storm"\nexpected = 3\nburst = 5.0') == pytest.approx(15)
    assert mean('arrival = "at"\ntimes = [0.1, 0.2]') == 2


def test_the_fingerprint_depends_only_on_options_of_a_trial() -> None:
    def fingerprint(text: str) -> str:
        return parse(text).fingerprint("dataset", "pages")

    same = (("repetitions = 2", "repetitions = 9"), ('["none"]', '["none", "mirror"]'), ('"small"', '"s"'))
    other = (
        ("seconds = 0.4", "seconds = 0.5"),
        ("count = 64", "count = 65"),
        ("expected = 30", "expected = 31"),
    )
    for old, new in same:
        assert fingerprint(SMALL.replace(old, new)) == fingerprint(SMALL)
    for old, new in other:
        assert fingerprint(SMALL.replace(old, new)) != fingerprint(SMALL)


def test_every_example_is_a_valid_plan() -> None:
    examples = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))
    assert examples
    for example in examples:
        assert isinstance(load(example), Plan)


def test_only_direct_mounts_change_the_fingerprint_of_a_trial() -> None:
    plain = parse(SMALL).fingerprint("dataset", "pages")
    assert parse('mode = "page cache"\n' + SMALL).fingerprint("dataset", "pages") == plain
    assert parse('mode = "direct"\n' + SMALL).fingerprint("dataset", "pages") != plain
