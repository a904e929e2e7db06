"""Promises of the ledger when memory fails, tested on a mount where memory does fail."""

import subprocess
import sys

import pytest
from ledger import PAGE, Ledger, LostRecord

from daxemu.events import FileDamaged, PoisonCleared

RECORDS = [f"record {i}".encode() * 10 for i in range(8)]


@pytest.fixture
def path(dax_mount):
    with Ledger(dax_mount / "ledger") as ledger:
        for record in RECORDS:
            ledger.append(record)
    return dax_mount / "ledger"


def everything(path):
    with Ledger(path) as ledger:
        return [ledger.read(i) for i in range(len(ledger))]


@pytest.mark.parametrize("copy", [0, 1])
def test_one_poisoned_copy_loses_no_record_and_is_rewritten(path, inject, dax_mount, dax_events, copy):
    inject(path, (2 * 3 + copy) * PAGE)
    assert dax_mount.damaged() == [("/ledger", (2 * 3 + copy) * PAGE, PAGE)]
    assert everything(path) == RECORDS
    assert dax_mount.damaged() == []
    assert [event.by for event in dax_events(PoisonCleared)] == ["write"]


def test_latent_poison_loses_no_record(path, inject, dax_events):
    inject(path, 0, latent=True)
    assert everything(path) == RECORDS
    assert [event.offset for event in dax_events.wait(FileDamaged)] == [0]


def test_two_poisoned_copies_are_an_error_and_never_wrong_data(path, inject):
    inject(path, 4 * PAGE, 2 * PAGE)
    with Ledger(path) as ledger:
        with pytest.raises(LostRecord, match="pages 4 and 5"):
            ledger.read(2)
        assert ledger.read(3) == RECORDS[3]


def test_appended_records_survive_a_loss_of_power(path, dax_mount):
    dax_mount.powerfail()
    dax_mount.mount()
    assert everything(path) == RECORDS


@pytest.mark.dax_policy(early_kill=1)
@pytest.mark.dax_size("6T")
def test_a_reader_that_never_maps_the_file_is_never_killed(path, inject):
    code = "import sys\nfrom test_ledger import *\nprint(len(everything(sys.argv[1])))"
    inject(path, 7 * PAGE)
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "8\n"), done.stderr


def test_a_device_that_goes_away_is_an_error(path, dax_mount):
    with Ledger(path) as ledger:
        dax_mount.remove()
        with pytest.raises((OSError, LostRecord)):
            ledger.read(0)
