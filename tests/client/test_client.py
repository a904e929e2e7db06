"""The client library against a real mount: typed requests, events, notices, under every event loop."""

from __future__ import annotations

import asyncio
import mmap
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import trio

from daxemu import protocol as p
from daxemu.client import AsyncClient, Client
from daxemu.client.connection import follow_of
from daxemu.errors import InvalidArgument, NotMounted
from daxemu.events import DeviceRemoved, Event, FileDamaged, MemoryFailureHandled, PoisonInjected
from tests.support.quick import QuickMount

pytestmark = pytest.mark.mount

Run = Callable[[Callable[[], Awaitable[Any]]], Any]


def on_asyncio(main: Callable[[], Awaitable[Any]]) -> Any:
    async def limited() -> Any:
        async with asyncio.timeout(20):
            return await main()

    return asyncio.run(limited())


def on_trio(main: Callable[[], Awaitable[Any]]) -> Any:
    async def limited() -> Any:
        with trio.fail_after(20):
            return await main()

    return trio.run(limited)


loops = pytest.mark.parametrize("run", [on_asyncio, on_trio])


def test_it_is_standard_library_until_types_are_used(quick_mount: QuickMount) -> None:
    code = (
        "import sys, daxemu.client\n"
        "with daxemu.client.Client.at(sys.argv[1]) as client:\n"
        "    client.request('status')\n"
        "print({'msgspec', 'trio', 'pyfuse3', 'numpy', 'asyncio', 'click'} & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, quick_mount.path], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "set()"


def test_a_typed_request_is_answered_in_its_type(quick_mount: QuickMount) -> None:
    file = quick_mount.make_file("f", 2)
    with Client.at(file) as client:
        done = client.ask(p.Inject([(4096, 4096)], ino=file.stat().st_ino))
        assert [(r.length, r.nr_pages, r.outcome) for r in done.ranges] == [(4096, 1, "Recovered")]
        assert client.ask(p.Damaged()).files == [p.DamagedRange(file.stat().st_ino, "/f", 4096, 4096)]
        assert client.ask(p.Status()).settings["early_kill"] == "0"
        assert client.ask(p.Set({"early_kill": "1"})) == p.Done()


def test_settle_counts_each_failure_so_far(quick_mount: QuickMount) -> None:
    file = quick_mount.make_file("f", 2)
    with Client.at(file, patience=20.0) as client:
        client.ask(p.Inject([(4096, 4096)], ino=file.stat().st_ino))
        assert client.settle() >= 0
        last = client.request("status")["events"]
        handled = [
            event.seq for event in _until(Client.at(file), last) if isinstance(event, MemoryFailureHandled)
        ]
        assert handled
        with pytest.raises(InvalidArgument, match="0 or more"):
            client.settle(-1)


def _until(listening: Client, last: int) -> list[Event]:
    with listening:
        events = listening.events()
        return [next(events) for _ in range(last)]


def test_an_idle_client_has_its_patience_at_its_next_request(
    quick_mount: QuickMount, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic
    with Client.at(quick_mount.path, patience=20.0) as client:
        for later in (1000, 2000):
            monkeypatch.setattr("daxemu.client.blocking.time", SimpleNamespace(monotonic=_later(now, later)))
            assert client.request("status")["state"] == "mounted"
        lines = client.follow_lines()
        monkeypatch.setattr("daxemu.client.blocking.time", SimpleNamespace(monotonic=_later(now, 3000)))
        assert b"Mounted" in next(lines)


def _later(now: Callable[[], float], seconds: float) -> Callable[[], float]:
    return lambda: now() + seconds


def test_a_typed_request_raises_what_the_supervisor_raised(quick_mount: QuickMount) -> None:
    with Client.at(quick_mount.path) as client:
        with pytest.raises(InvalidArgument, match="past the end of the device"):
            client.ask(p.Inject([(1 << 50, 4096)]))
        with pytest.raises(InvalidArgument, match="no range"):
            client.ask(p.Clear([]))


def test_every_request_says_what_answers_it() -> None:
    answers = {kind.__name__: p.reply_type(kind).__name__ for kind in p.REQUEST_TYPES}
    assert answers["Inject"] == "Injected"
    assert answers["Follow"] == "Never"
    assert len(answers) == len(p.REQUEST_TYPES)


def test_a_class_of_the_protocol_is_a_request() -> None:
    tags = re.findall(r'^class \w+\(Request\[\w+\], tag="(\w+)"', Path(p.__file__).read_text(), re.MULTILINE)
    assert len(tags) > 10
    assert [str(kind.__struct_config__.tag) for kind in p.REQUEST_TYPES] == tags
    values: dict[str, object] = {"settings": {}, "ranges": [], "then": [], "on": {"op": "any", "file": "*"}}
    for kind in p.REQUEST_TYPES:
        needed = [field.name for field in msgspec.structs.fields(kind) if field.required]
        line = {"op": kind.__struct_config__.tag, **{name: values.get(name, 0) for name in needed}}
        assert type(p.decode_request(msgspec.json.encode(line))) is kind


def test_events_are_an_iterator_of_types(quick_mount: QuickMount) -> None:
    file, other = quick_mount.make_file("f", 4), quick_mount.make_file("g", 4)
    with Client.at(file) as asking, Client.at(file) as listening:
        for target in (other, file):
            asking.ask(p.Inject([(0, 4096)], ino=target.stat().st_ino))
        events = listening.events(kinds=[PoisonInjected, FileDamaged], files=[file])
        damage = next(events)
        assert isinstance(damage, FileDamaged)
        assert (damage.path, damage.offset, damage.length) == ("/f", 0, 4096)


def test_events_end_with_the_mount(quick_mount: QuickMount) -> None:
    with Client.at(quick_mount.path) as listening:
        events = listening.events()
        quick_mount.umount()
        assert [type(event).__name__ for event in events][:1] == ["Mounted"]


def test_a_file_that_is_not_there_cannot_be_followed(quick_mount: QuickMount) -> None:
    with pytest.raises(InvalidArgument, match="No such file"):
        follow_of(0, files=[quick_mount.path / "nothing"])


def test_notices_of_named_files_and_ranges(quick_mount: QuickMount) -> None:
    file, other = quick_mount.make_file("f", 4), quick_mount.make_file("g", 4)
    with Client.at(file) as asking, Client.at(file) as listening:
        notices = listening.notices((file, 8192, 4096))
        for target, page in ((other, 2), (file, 1), (file, 2)):
            asking.ask(p.Inject([(page * 4096, 4096)], ino=target.stat().st_ino))
        notice = next(notices)
        assert (notice.path, notice.offset, notice.length, notice.addresses) == ("/f", 8192, 4096, ())
        asking.ask(p.Remove())
        assert {next(notices).path, next(notices).path} == {None}


def test_notices_of_what_this_process_has_mapped(quick_mount: QuickMount) -> None:
    file, other = quick_mount.make_file("f", 8), quick_mount.make_file("g", 4)
    fd = os.open(file, os.O_RDONLY)
    view = mmap.mmap(fd, 4 * 4096, prot=mmap.PROT_READ, offset=2 * 4096)
    os.close(fd)
    try:
        with Client.at(file) as asking, Client.at(file) as listening:
            notices = listening.notices()
            ino = file.stat().st_ino
            asking.ask(p.Inject([(0, 4096)], ino=other.stat().st_ino))
            asking.ask(p.Inject([(0, 4096)], ino=ino))  # in the file, but not in the mapping
            asking.ask(p.Inject([(3 * 4096, 2 * 4096)], ino=ino))
            notice = next(notices)
            assert (notice.path, notice.offset, notice.length) == ("/f", 3 * 4096, 2 * 4096)
            start = next(
                int(line.split("-")[0], 16)
                for line in Path("/proc/self/maps").read_text().splitlines()
                if line.endswith(str(file))
            )
            assert notice.addresses == ((start + 4096, 2 * 4096),)
    finally:
        view.close()


@loops
def test_async_requests_and_refusals(quick_mount: QuickMount, run: Run) -> None:
    file = quick_mount.make_file("f", 2)

    async def main() -> None:
        async with AsyncClient.at(file) as client:
            assert (await client.request("status"))["state"] == "mounted"
            assert (await client.ask(p.Inject([(0, 4096)], ino=file.stat().st_ino))).holes == 0
            assert await client.settle() >= 0
            with pytest.raises(InvalidArgument, match="no setting"):
                await client.request("set", settings={"nothing": "1"})
            assert (await client.ask(p.GetBadblocks())).sectors == 8

    run(main)


@loops
def test_async_events_and_notices(quick_mount: QuickMount, run: Run) -> None:
    file = quick_mount.make_file("f", 2)

    async def main() -> None:
        async with AsyncClient.at(file) as asking, AsyncClient.at(file) as listening:
            await asking.ask(p.Inject([(0, 4096)], ino=file.stat().st_ino))
            async for event in listening.events(kinds=[MemoryFailureHandled]):
                assert isinstance(event, MemoryFailureHandled)
                assert event.files == 1
                break
        async with AsyncClient.at(file) as asking, AsyncClient.at(file) as listening:
            seen = (await asking.request("status"))["events"]
            await asking.ask(p.Remove())
            kinds = [type(notice.event) async for notice in _first(2, listening.notices(file, after=seen))]
            assert DeviceRemoved in kinds

    run(main)


async def _first(count: int, items: Any) -> Any:
    async for item in items:
        yield item
        count -= 1
        if not count:
            return


@loops
def test_async_a_supervisor_that_goes_away(quick_mount: QuickMount, run: Run) -> None:
    async def main() -> None:
        async with AsyncClient.at(quick_mount.path) as client:
            assert (await client.ask(p.Status())).state == "mounted"
            quick_mount.kill()
            with pytest.raises(NotMounted, match="went away"):
                await client.ask(p.Status())
            assert [event async for event in client.events()] == []

    run(main)
    with pytest.raises(NotMounted):
        AsyncClient.at(quick_mount.path)


def test_events_go_on_after_a_timeout(quick_mount: QuickMount) -> None:
    with Client.at(quick_mount.path) as asking, Client.at(quick_mount.path) as listening:
        seen = asking.ask(p.Status()).events
        events = listening.events(seen)
        listening.set_patience(0.001)
        with pytest.raises(TimeoutError):
            next(events)
        listening.set_patience(20)
        asking.ask(p.Inject([(1 << 28, 4096)]))
        assert isinstance(next(events), PoisonInjected)


async def _soon(run: Run, events: AsyncIterator[Event]) -> None:
    if run is on_asyncio:
        async with asyncio.timeout(0.01):
            await anext(events)
    else:
        with trio.fail_after(0.01):
            await anext(events)


@loops
def test_async_events_go_on_after_a_timeout(quick_mount: QuickMount, run: Run) -> None:
    async def main() -> None:
        async with AsyncClient.at(quick_mount.path) as asking, AsyncClient.at(quick_mount.path) as listening:
            events = listening.events((await asking.ask(p.Status())).events)
            with pytest.raises((TimeoutError, trio.TooSlowError)):
                await _soon(run, events)
            await asking.ask(p.Inject([(1 << 28, 4096)]))
            assert isinstance(await anext(events), PoisonInjected)

    run(main)
