"""The pytest plugin, in separate sessions."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from daxemu.host.proc.mountinfo import mounts
from daxemu.pytest_plugin.mount import DaxMount
from tests.support.pages import TOP

pytestmark = pytest.mark.mount
pytest_plugins = ["pytester"]

LIMIT = 100


def run(pytester: pytest.Pytester, code: str, *options: str, orphans: bool = False) -> pytest.RunResult:
    """Run a test file. Afterwards no mount is left and, unless ``orphans``, no device."""
    pytester.makepyfile(code)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *options, timeout=LIMIT)
    deadline = time.monotonic() + LIMIT
    while there := [mount for mount in mounts() if pytester.path in mount.mountpoint.parents]:
        assert orphans, there  # a supervisor sees by itself that its pytest was killed
        assert time.monotonic() < deadline, there
        time.sleep(0.05)
    left = [path for path in Path("/dev/shm").glob("daxemu-pytest-*") if _is_orphan(path)]
    assert left == [] or orphans
    return result


def _is_orphan(device: Path) -> bool:
    return not Path("/proc", device.name.split("-")[2]).exists()


def test_the_fixtures_work_together(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        import os, pytest
        from daxemu.events import Event, FileDamaged, PoisonInjected
        from daxemu.client import Client

        def test_it(dax_mount, dax_device, inject, dax_events):
            assert dax_mount.device == dax_device and os.path.ismount(dax_mount)
            file = dax_mount / "f"
            file.write_bytes(b"x" * 10000)
            done = inject(file, 4096)
            assert [(r.length, r.outcome) for r in done.ranges] == [(4096, "Recovered")]
            with pytest.raises(OSError):
                file.read_bytes()
            assert dax_mount.damaged() == [("/f", 4096, 4096)]
            assert [e.offset for e in dax_events(FileDamaged)] == [4096]
            assert len(dax_events()) > 2 and len(dax_events.wait(PoisonInjected)) == 1
            assert dax_mount.clear(file) == 4096
            assert file.read_bytes()[4096:8192] == bytes(4096)
            inject(file, 8192)   # the rest of the file, rounded out to sectors
            inject(dax_mount, 1 << 20, 512)
            assert dax_mount.clear(dax_mount) == 2048 + 512
            with pytest.raises(TimeoutError, match="1 of 2 events FileDamaged"):
                dax_events.wait(FileDamaged, 20, timeout=0.2)

        def test_another_mount_is_fresh(dax_mount):
            assert os.listdir(dax_mount) == []
        """.replace("1 of 2 events", "of 20 events"),
    )
    result.assert_outcomes(passed=2)


def test_markers(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        import pytest
        from daxemu.pmem.device_dir import DeviceDir

        @pytest.mark.dax_size("6T")
        @pytest.mark.dax_mkfs(altmap=True)
        @pytest.mark.dax_policy(early_kill=1, lost_store="eio")
        def test_all_of_them(dax_mount):
            with dax_mount.client() as client:
                status = client.request("status")
            assert 5 << 40 < status["size"] < 6 << 40  # less its altmap
            assert status["settings"]["early_kill"] == "1" and status["settings"]["lost_store"] == "eio"
            assert DeviceDir.load(dax_mount.device).config.altmap > 0

        @pytest.mark.dax_mkfs(struct_pages=False)
        def test_without_struct_pages(dax_device):
            assert not DeviceDir.load(dax_device).config.struct_pages
        """,
        "--strict-markers",
    )
    result.assert_outcomes(passed=2)


@pytest.mark.parametrize(
    ("marker", "refusal"),
    [
        ('dax_size("4Q")', "*'4Q' is not a size*"),
        ("dax_size()", "*dax_size takes one argument*"),
        ("dax_policy(color=1)", "*no setting 'color'*"),
        ('dax_repair("no-such-strategy")', "*repair*"),
    ],
)
def test_a_marker_that_makes_no_sense_is_an_error(
    pytester: pytest.Pytester, marker: str, refusal: str
) -> None:
    code = f"import pytest\n@pytest.mark.{marker}\ndef test_it(dax_mount): pass\n"
    result = run(pytester, code)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([refusal])


def test_the_repair_strategy_is_passed_on(tmp_path: Path) -> None:
    command = DaxMount(tmp_path / "device", tmp_path / "mnt", {}, "mirror:copies=2").mount_command()
    assert command[-2:] == ["--repair", "mirror:copies=2"]
    assert command[3:6] == ["mount", str(tmp_path / "device"), str(tmp_path / "mnt")]
    assert "--repair" not in DaxMount(tmp_path / "device", tmp_path / "mnt", {}, None).mount_command()


def test_a_failure_shows_events_and_damaged_files(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        def test_it(dax_mount, inject):
            (dax_mount / "precious").write_bytes(b"x" * 8192)
            inject(dax_mount / "precious", 4096)
            assert (dax_mount / "precious").read_bytes()
        """,
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "*OSError*Input/output error*",
            "*-- daxemu damaged files --*",
            "* is mounted",
            "/precious 0x1000+0x1000",
            "*-- daxemu events --*",
            "mounted *",
            "*recovery action for dax page: Recovered",
        ]
    )


def test_a_failure_after_a_removal_shows_what_is_known(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        def test_it(dax_mount):
            dax_mount.remove()
            (dax_mount / "f").read_bytes()

        def test_without_a_mount(dax_mount):
            dax_mount.powerfail()
            assert False
        """,
    )
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        ["* is removed*", "*was removed, 0 processes signalled", "not known: *not on a daxemu mount*"]
    )


def test_a_test_that_passes_shows_nothing(pytester: pytest.Pytester) -> None:
    result = run(pytester, "def test_it(dax_mount): pass")
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*daxemu events*")


def test_under_xdist_workers_do_not_meet(pytester: pytest.Pytester) -> None:
    code = """
        import pytest

        @pytest.mark.parametrize("n", range(6))
        def test_it(dax_mount, inject, n):
            file = dax_mount / "f"
            file.write_bytes(b"x" * 4096 * 8)
            inject(file, n * 4096)
            assert dax_mount.damaged() == [("/f", n * 4096, 4096)]
            assert n != 3
        """
    result = run(pytester, code, "-n", "2")
    result.assert_outcomes(passed=5, failed=1)
    result.stdout.fnmatch_lines(["*daxemu damaged files*", "/f 0x3000+0x1000"])


HANGS = {
    "a wait for what never comes": "threading.Event().wait()",
    "a handler of SIGBUS that returns": """
    with open(file) as opened:
        view = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
    signal.signal(signal.SIGBUS, lambda *_: None)
    view[0]
    raise AssertionError("the poison was cleared, but the test went on")""",
    "a supervisor that stands still": """
    with dax_mount.client() as client:
        pid = client.request("status")["pid"]
    os.kill(pid, signal.SIGSTOP)
    (dax_mount / "new").write_bytes(b"x")""",
}


@pytest.mark.parametrize("hang", HANGS.values(), ids=HANGS.keys())
def test_a_test_that_hangs_fails_alone_and_says_why(pytester: pytest.Pytester, hang: str) -> None:
    code = f"""
import mmap, os, pytest, signal, threading

@pytest.mark.dax_timeout(3)
def test_hangs(dax_mount, inject):
    file = dax_mount / "f"
    file.write_bytes(b"x" * 4096)
    inject(file)
    {hang.lstrip()}

def test_the_next_one(dax_mount):
    (dax_mount / "f").write_bytes(b"x")
"""
    result = run(pytester, code)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["*the test hung: it took more than 3 s (dax_timeout) on */dax*", "*last event: *"]
    )


DEAF = """
import ctypes, signal

def test_deaf(dax_mount):
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    ctypes.CDLL(None).pause()

def test_the_next_one(dax_mount):
    pass
"""


def test_one_that_cannot_be_ended_alone_takes_pytest_with_it(pytester: pytest.Pytester) -> None:
    result = run(pytester, DEAF, "-o", "dax_timeout=4", orphans=True)
    assert result.ret == -9
    result.stderr.fnmatch_lines(
        ["the test hung: it took more than 4 s*", "It could not be ended alone: pytest is killed."]
    )


def test_one_that_cannot_be_ended_alone_takes_only_its_worker_under_xdist(pytester: pytest.Pytester) -> None:
    result = run(pytester, DEAF, "-o", "dax_timeout=4", "-n", "1", orphans=True)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*worker * crashed while running *test_deaf*"])


def test_the_mount_ends_with_a_pytest_that_is_killed(pytester: pytest.Pytester) -> None:
    code = "import os, signal\ndef test_it(dax_mount): os.kill(os.getpid(), signal.SIGKILL)"
    assert run(pytester, code, orphans=True).ret == -9
    # The next session removes its device.
    run(pytester, "def test_it(dax_mount): pass").assert_outcomes(passed=1)


def test_it_costs_nothing_until_it_is_used(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        import sys

        def test_it():
            assert "daxemu.pytest_plugin" in sys.modules
            assert not {"trio", "numpy", "msgspec", "pyfuse3", "click"} & set(sys.modules)
        """,
    )
    result.assert_outcomes(passed=1)


def test_the_example_project_passes(pytester: pytest.Pytester) -> None:
    shutil.copytree(TOP / "examples" / "ledger", pytester.path, dirs_exist_ok=True)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", timeout=LIMIT)
    result.assert_outcomes(passed=7)


VICTIM = """
        import os, subprocess, sys
        import pytest
        from daxemu.events import FileDamaged, SignalSent

        LOAD = ("import mmap, os, sys; os.write(os.open('/proc/self/comm', os.O_WRONLY), b'\\\\x1b[31mred'); "
                "f = open(sys.argv[1], 'rb'); mmap.mmap(f.fileno(), 0, prot=1)[0]")

        @pytest.fixture
        def file(dax_mount):
            path = dax_mount / "f"
            path.write_bytes(b"x" * 8192)
            return path

        def kill(file):
            assert subprocess.run([sys.executable, "-c", LOAD, file]).returncode < 0
"""


def test_none_and_exactly_pass_where_they_should(pytester: pytest.Pytester) -> None:
    code = """
        def test_it(dax_mount, file, inject, dax_events):
            dax_events.none()
            inject(file, 0)
            dax_events.none()
            dax_events.none(SignalSent)
            (damage,) = dax_events.exactly(1, FileDamaged)
            assert damage.path == "/f"
            for count in range(1, 6):
                kill(file)
                assert len(dax_events.exactly(count)) == count
            dax_mount.umount()
            assert len(dax_events.exactly(5)) == 5  # nothing is under way any more
    """
    run(pytester, VICTIM + code).assert_outcomes(passed=1)


def test_none_and_exactly_say_what_came_instead(pytester: pytest.Pytester) -> None:
    code = """
        def test_none(file, inject, dax_events):
            inject(file, 0)
            kill(file)
            dax_events.none()

        def test_too_few(file, inject, dax_events):
            inject(file, 0)
            dax_events.exactly(1)

        def test_too_many(file, inject, dax_events):
            inject(file, 0)
            inject(file, 4096)
            dax_events.exactly(1, FileDamaged)
    """
    result = run(pytester, VICTIM + code)
    result.assert_outcomes(failed=3)
    result.stdout.fnmatch_lines(
        [
            "*AssertionError: 1 events SignalSent, expected 0",
            "*SIGBUS BUS_MCEERR_AR to \\x1b[[]31mred:* thread * lsb 12: delivered",
            "*AssertionError: 0 events SignalSent, expected 1",
            "*AssertionError: 2 events FileDamaged, expected 1",
            "*damaged: /f 0x0+0x1000",
            "*damaged: /f 0x1000+0x1000",
        ]
    )
    result.stdout.no_fnmatch_line("*\x1b*")


def test_a_kind_of_failure_is_injected(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        import pytest
        from daxemu.errors import InvalidArgument
        from daxemu.events import SilentlyCorrupted

        def test_it(dax_mount, inject, dax_events):
            file = dax_mount / "f"
            file.write_bytes(b"x" * 8192)
            done = inject(file, 4096, kind="silent", seed=3)
            assert [(r.kind.value, r.outcome) for r in done.ranges] == [("silent", "silent")]
            read = file.read_bytes()
            assert read[:4096] == b"x" * 4096 and read[4096:] != b"x" * 4096
            assert len(dax_events(SilentlyCorrupted)) == 1
            assert [r.kind.value for r in inject(file, latent=True).ranges] == ["latent"]
            with pytest.raises(InvalidArgument, match="no kind of injection"):
                inject(file, kind="removal")
        """,
    )
    result.assert_outcomes(passed=1)


def test_a_direct_mount(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        import mmap, subprocess, sys, textwrap
        import pytest
        from daxemu.events import Mounted, SignalSent
        from daxemu.protocol import Status

        STORE = '''
        import mmap, sys
        with open(sys.argv[1], "r+b") as file:
            view = mmap.mmap(file.fileno(), 0)
        view[5] = 33
        print("stored", flush=True)
        input()
        view[0]
        '''

        @pytest.mark.dax(direct=True)
        def test_direct(dax_mount, inject, dax_events):
            assert dax_mount.is_direct
            with dax_mount.client() as client:
                assert client.ask(Status()).mode == "direct"
            assert [event.mode for event in dax_events(Mounted)] == ["direct"]
            file = dax_mount / "f"
            file.write_bytes(b"x" * 8192)
            with open(file, "r+b") as opened, pytest.raises(OSError):
                mmap.mmap(opened.fileno(), 0)
            command = dax_mount.under_run(sys.executable, "-c", textwrap.dedent(STORE), file)
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as program:
                assert program.stdout.readline() == "stored\\n"
                assert file.read_bytes()[4:7] == b"x!x"
                inject(file, 0)
                program.communicate("\\n", timeout=30)
            assert program.returncode == -7
            assert [event.pid for event in dax_events.exactly(1)] == [program.pid]

        def test_page_cache(dax_mount):
            assert not dax_mount.is_direct
            with dax_mount.client() as client:
                assert client.ask(Status()).mode == "page cache"
        """,
    )
    result.assert_outcomes(passed=2)


def test_the_marker_of_the_mode_takes_no_other_word(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        import pytest
        @pytest.mark.dax(dirct=True)
        def test_it(dax_mount): pass
        """,
    )
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*dax takes the keyword direct*"])
