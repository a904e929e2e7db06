"""daxemu evaluate and fleet, end to end on real mounts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from daxemu.evaluate.metrics import figures
from daxemu.evaluate.trial import Key, Result, TrialRequest, make_trial
from daxemu.host.proc.mountinfo import mounts
from daxemu.host.run import zone
from tests.evaluate.plans import SMALL
from tests.support.mount import DAXEMU

pytestmark = pytest.mark.mount

PATIENCE = 110


def run(*arguments: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*DAXEMU, *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def plan_file(directory: Path, text: str) -> Path:
    plan = directory / "plan.toml"
    plan.write_text(text)
    return plan


def trials(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "r.trials.jsonl").read_text().splitlines()]


@pytest.mark.timeout(180)
def test_ctrl_c_keeps_what_is_done_the_same_command_goes_on_and_the_report_is_right(tmp_path: Path) -> None:
    plan = plan_file(tmp_path, SMALL)
    command = [*DAXEMU, "evaluate", str(plan), "-o", str(tmp_path / "r.html"), "-j", "1"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    first = process.stderr.readline()
    assert first.startswith("1/2 none / dataset / pages / 0"), first
    # In the middle of the second trial, as soon as its mount is there.
    own = f"daxemu-trial-{process.pid}-"
    deadline = time.monotonic() + 60
    while not any(own in str(found.device) for found in mounts()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 130, said
    assert "1 trial kept in " in said
    assert not any(own in str(found.device) for found in mounts())
    assert not [p for p in Path("/dev/shm").iterdir() if own in p.name]
    kept = trials(tmp_path)
    assert [trial["key"]["repetition"] for trial in kept] == [0]
    done = run("evaluate", plan, "-o", tmp_path / "r.html", "-j", "1")
    assert done.stdout == f"{tmp_path}/r.html: 2 trials\n"
    assert done.stderr.splitlines()[0].startswith("1/1 none / dataset / pages / 1")
    assert trials(tmp_path)[0] == kept[0]
    more = plan_file(tmp_path, SMALL.replace('["none"]', '["none", "no-such-strategy"]'))
    again = run("evaluate", more, "-o", tmp_path / "r.html", "--json", status=1)
    assert json.loads(again.stdout) == {"report": str(tmp_path / "r.html"), "trials": 2, "failed": 2}
    assert "no result: no-such-strategy / dataset / pages / 0: " in again.stderr
    check_report(tmp_path)
    checked = json.loads(run("fleet", more, "--check", tmp_path / "r.json", "--json").stdout)
    (comparison,) = checked["comparisons"]
    assert comparison["agree"]


def check_report(directory: Path) -> None:
    """Every poisoned page of the data set was found by reading it back, and nothing else was."""
    report = json.loads((directory / "r.json").read_text())
    (cell,) = report["cells"]
    assert cell["trials"] == 2
    assert cell["metrics"]["throughput"]["value"] > 0
    assert cell["metrics"]["bytes_lost"]["value"] > 0
    assert cell["metrics"]["silent"]["value"] == 0
    assert "<svg" in (directory / "r.html").read_text()
    good = [trial for trial in trials(directory) if trial["failed"] is None]
    for trial in good:
        injected = [fault for fault in trial["faults"] if fault["result"] == "injected"]
        assert injected
        assert {fault["outcome"] for fault in injected} == {"latent"}
        pages = {
            page
            for fault in injected
            for page in range(fault["offset"] // 4096, -(-(fault["offset"] + fault["length"]) // 4096))
        }
        lost = sum(bad[3] for bad in trial["bad"])
        assert {bad[4] for bad in trial["bad"]} == {"unreadable"}
        # A row may reach over the end of the file, and its last page is not full.
        assert (len(pages) - 4) * 4096 < lost <= len(pages) * 4096
    assert good[0]["faults"] != good[1]["faults"], "each repetition has its own"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Start a Dask cluster of two workers. Returns the address of its scheduler."""
    monkeypatch.setenv("PYTHONHASHSEED", "0")  # Dask sets the variable for good; monkeypatch undoes that
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as made:
        yield made.scheduler_address


@pytest.mark.timeout(180)
def test_the_trials_of_a_cluster_are_those_of_this_machine(tmp_path: Path, cluster: str) -> None:
    plan = plan_file(tmp_path, SMALL)
    done = run("evaluate", plan, "-o", tmp_path / "r", "--scheduler", cluster)
    assert done.stdout == f"{tmp_path}/r.html: 2 trials\n"
    fleet = plan_file(tmp_path, SMALL.replace("expected = 30", "rate = 30.0"))
    there = run("fleet", fleet, "--devices", "1200", "--scheduler", cluster).stdout
    assert run("fleet", fleet, "--devices", "1200").stdout == there
    drawn = [[fault["fault"]["time"] for fault in trial["faults"]] for trial in trials(tmp_path)]
    assert len(drawn) == 2
    assert drawn[0] != drawn[1]


ODD = (
    SMALL.partition("[[faults]]")[0]
    .replace("repetitions = 2", "repetitions = 1")
    .replace(
        "seconds = 0.4", "seconds = 3"
    )  # the fault at 0.1 s must come before the end on slow machines, too
    + """
[[faults]]
name = "removal"
[[faults.process]]
kind = "removal"
arrival = "at"
times = [0.1]
[[faults]]
name = "metadata"
[[faults.process]]
target = "metadata"
arrival = "at"
times = [0.1]
"""
)


@pytest.mark.parametrize(
    ("faults", "state", "lost"), [("removal", "removed", True), ("metadata", "shut down", False)]
)
def test_what_takes_the_whole_filesystem(tmp_path: Path, faults: str, state: str, lost: bool) -> None:
    task = TrialRequest(
        ODD, Key("none", "dataset", faults, 0), str(tmp_path / "trial"), str(tmp_path / "device")
    )
    result = make_trial(task)
    assert result.failed is None
    assert result.state == state
    assert [(fault.result, fault.reason) for fault in result.faults] == [("injected", "")]
    assert all(life.first is None or life.start < life.first <= life.end for life in result.lives)
    # From the fault on no operation succeeds: how long that is depends on how long the fault took.
    (life, *_), (fault,) = result.lives, result.faults
    ended = ("DeviceRemoved", "FilesystemShutdown")
    shut = min(event["time"] for event in result.events if event["event"] in ended)
    assert fault.time <= shut < life.end or life.status == -signal.SIGBUS
    assert 0 < result.down <= life.end - fault.time or life.status == -signal.SIGBUS
    assert figures(result).values["bytes_lost"] == (result.size if lost else 0)
    assert msgspec.json.decode(msgspec.json.encode(result), type=Result) == result
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="direct mounts need root")
def test_on_a_direct_mount_the_workload_maps_the_media(tmp_path: Path) -> None:
    text = SMALL.replace('name = "small"', 'name = "small"\nmode = "direct"\nearly_kill = true')
    text = text.replace('"access"', '"reported"').replace("repetitions = 2", "repetitions = 1")
    plan = plan_file(tmp_path, text)
    run("evaluate", plan, "-o", tmp_path / "r.html")
    (trial,) = trials(tmp_path)
    assert trial["mode"] == "direct"
    addresses = [event["address"] for event in trial["events"] if event["event"] == "SignalSent"]
    assert addresses
    assert all(any(address in each for each in zone.SLICES) for address in addresses)
    assert json.loads((tmp_path / "r.json").read_text())["modes"] == ["direct"]
    assert "mounted for direct mappings" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("option", ["--costs", "--check"])
def test_a_fleet_takes_no_report_of_another_mode(tmp_path: Path, option: str) -> None:
    report = tmp_path / "r.json"
    report.write_text(json.dumps({"plan": {"mode": "direct"}, "cells": []}))
    plan = plan_file(tmp_path, SMALL.replace("expected = 30", "rate = 30.0"))
    done = run("fleet", plan, option, report, status=2)
    assert done.stderr == (
        f'daxemu: {report} is of mode "direct", the plan of "page cache": give a report of that mode\n'
    )
    plan_file(tmp_path, 'mode = "direct"\n' + plan.read_text())
    assert json.loads(run("fleet", plan, "--json").stdout)["mode"] == "direct"


def test_nobody_at_the_scheduler(tmp_path: Path) -> None:
    plan = plan_file(tmp_path, SMALL)
    done = run("evaluate", plan, "-o", tmp_path / "r", "--scheduler", "tcp://127.0.0.1:9", status=2)
    assert done.stderr.splitlines()[-1].startswith("daxemu: no Dask scheduler answers at tcp://127.0.0.1:9")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("evaluate", "PLAN", "-o", "/nowhere/r"), 2, "give the name of a file"),
        (("evaluate", "PLAN"), 2, "Missing option"),
        (("evaluate", "/nowhere.toml", "-o", "r"), 2, "does not exist"),
        (("fleet", "PLAN"), 2, "no rate or fit_per_mbit"),
        (("fleet", "PLAN", "--faults", "none"), 2, "no fault plan 'none'"),
        (("fleet", "PLAN", "--check", "PLAN"), 2, "give a REPORT.json"),
    ],
)
def test_bad_input(tmp_path: Path, arguments: tuple[str, ...], status: int, said: str) -> None:
    plan = str(plan_file(tmp_path, SMALL))
    done = run(*(plan if word == "PLAN" else word for word in arguments), status=status)
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_other_verbs_do_not_pay_for_numpy() -> None:
    code = "import sys, daxemu.cli.evaluate, daxemu.cli.fleet; print({'numpy', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
