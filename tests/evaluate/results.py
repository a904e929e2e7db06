"""Results of trials, made by hand."""

from __future__ import annotations

from typing import Any

from daxemu.evaluate.faults import Fault
from daxemu.evaluate.injector import FaultRecord
from daxemu.evaluate.plan import parse
from daxemu.evaluate.tender import WorkloadLife
from daxemu.evaluate.trial import Key, Result
from daxemu.evaluate.workloads.base import Mismatch
from daxemu.failure_kind import FailureKind
from tests.evaluate.plans import SMALL

TEXT = SMALL.replace('["none"]', '["none", "mirror"]')
PLAN = parse(TEXT)
BASE_PFN = 0x100000


def result(strategy: str = "none", repetition: int = 0, **changed: Any) -> Result:
    """Return a result of PLAN: 100 operations, one lost page, one process killed by SIGBUS."""
    fault = Fault(0.1, FailureKind.POISON, "files", "page", 0.5, 4096, "reported", 0.1, 0, 1)
    made = Result(
        key=Key(strategy, "dataset", "pages", repetition),
        fingerprint=PLAN.fingerprint("dataset", "pages"),
        seconds=0.4,
        wall=2.0,
        samples=[(0.0, 1, 10, 0), (0.2, 60, 600, 0), (0.4, 100, 1000, 3)],
        lives=[WorkloadLife(-0.1, 0.2, status=-7), WorkloadLife(0.2, 0.41)],
        down=0.05,
        faults=[FaultRecord(fault, "injected", 0.1, 8192, 4096, "Recovered", 1, "f")],
        events=[
            {"event": "PoisonInjected", "time": 0.1, "offset": 8192, "length": 4096, "latent": False},
            {
                "event": "FileDamaged",
                "time": 0.101,
                "ino": 7,
                "path": "/work/f",
                "offset": 4096,
                "length": 512,
            },
            signal(0.102, 50),
            handled(0.103, BASE_PFN + 2),
        ],
        size=100_000,
        used=200_000,
        device=32 << 20,
        base_pfn=BASE_PFN,
        bad=[Mismatch("f", 7, 4096, 4096, "unreadable")],
        state="mounted",
    )
    for name, value in changed.items():
        setattr(made, name, value)
    return made


def signal(time: float, pid: int) -> dict[str, Any]:
    return {"event": "SignalSent", "time": time, "pid": pid, "comm": "w", "code": 5, "result": "delivered"}


def handled(time: float, pfn: int) -> dict[str, Any]:
    return {"event": "MemoryFailureHandled", "time": time, "pfn": pfn, "nr_pages": 1, "files": 1, "told": 1}


def finished(time: float, verdict: str, seconds: float, lost: list[list[int]]) -> dict[str, Any]:
    return {
        "event": "RepairFinished",
        "time": time,
        "strategy": "mirror",
        "pfn": BASE_PFN + 2,
        "nr_pages": 1,
        "verdict": verdict,
        "transparent": True,
        "seconds": seconds,
        "lost": lost,
        "reason": "",
    }


def corruption(time: float, *, repaired: bool) -> dict[str, Any]:
    return {
        "event": "CorruptionFound",
        "time": time,
        "offset": 4096,
        "length": 512,
        "by": "scrub",
        "repaired": repaired,
    }
