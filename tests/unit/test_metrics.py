"""Metrics: those of docs/metrics.md and no others; scrapers that hang, crowd or talk nonsense; ports that are taken."""

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mxfs_proto.errors import IoFailure
from mxfs_proto.ops import Op
from mxfsd import metricsserver, rundir
from mxfsd.figures import BUCKETS_S, Figures
from mxfsd.metrics import exposition
from mxfsd.metricsserver import CONNECTIONS, MetricsServer
from mxfsd.options import parse

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()


def view(role: str = "home") -> dict[str, Any]:
    """A status reply with its figures."""
    figures = Figures()
    figures.joined(1, "n1")
    figures.joined(2, 'n"2\\')
    figures.of(2).ended(Op.CREATE, 0.0004)
    figures.of(2).ended(Op.CREATE, 0.03)
    figures.of(2).ended(Op.CREATE, 60)
    figures.of(2).bytes_written = 4096
    nodes = figures.nodes()
    if role == "home":
        for node in nodes:
            node |= {"held": node["slot"], "waiting": 0, "unstable_files": 3}
    return {
        "volume": "v",
        "label": "data",
        "device": "/dev/sdb",
        "node": "n1",
        "fencing": "pr",
        "role": role,
        "serving": True,
        "epoch": 7,
        "nodes": [
            {"slot": 1, "name": "n1", "state": "active", "age_ms": 120},
            {"slot": 2, "name": 'n"2\\', "state": "active", "age_ms": 15300},
        ],
        "lease": {"age_ms": 200, "left_ms": 4000},
        "takeovers": {"free": 1, "fenced": 2},
        "takeover_ms": 1500,
        "totals": {"executed": 3, "grants": 11, "waits": 4, "log_forces": 5, "put_out": 1},
        "locks": {"held": 3, "cached": 9, "waiting": 0},
        "figures": {
            "now_s": 1.0,
            "buckets_s": list(BUCKETS_S),
            "nodes": nodes,
            "here": {"running": 2, "connected": 1} if role == "home" else {},
        },
    }


def families(of: dict[str, Any]) -> dict[str, Any]:
    return {family.name: family for family in text_string_to_metric_families(exposition(of).decode())}


def value(of: dict[str, Any], sample: str, **labels: str) -> float:
    (found,) = [
        each.value
        for family in families(of).values()
        for each in family.samples
        if each.name == sample and labels.items() <= each.labels.items()
    ]
    return float(found)


# -- what is exposed ---------------------------------------------------------------------------------------------


def test_the_document_lists_what_is_exposed() -> None:
    rows = re.findall(r"^\| `(mxfs_\w+)` \| (\w+) \| ([\w, ]+) \| .+ \|$", PAGE, re.M)
    documented = {name.removesuffix("_total"): (kind, set(labels.split(", "))) for name, kind, labels in rows}
    exposed = {
        name: (family.type, {label for each in family.samples for label in each.labels} - {"le"})
        for name, family in families(view()).items()
    }
    assert documented == exposed
    assert len(rows) == len(documented)
    assert all(name.endswith("_total") == (kind == "counter") for name, kind, _labels in rows)


def test_only_the_home_tells_what_only_the_home_knows() -> None:
    home, client = set(families(view())), set(families(view("client")))
    assert home - client == {
        f"mxfs_{name}"
        for name in (
            *("locks_held", "locks_waiting", "unstable_files"),
            *("lock_resources", "operations_running", "connected_nodes"),
        )
    }
    assert client < home


def test_values() -> None:
    seen, name = view(), 'n"2\\'
    assert value(seen, "mxfs_home", volume="v") == 1
    assert value(view("client"), "mxfs_home") == 0
    assert value(seen, "mxfs_slot_age_seconds", node=name, slot="2") == 15.3
    assert value(seen, "mxfs_operation_duration_seconds_count", node=name, op="CREATE") == 3
    assert value(seen, "mxfs_operation_duration_seconds_sum", node=name, op="CREATE") == pytest.approx(60.0304)
    for bound, count in (("0.0005", 1), ("0.025", 1), ("0.05", 2), ("10.0", 2), ("+Inf", 3)):
        assert value(seen, "mxfs_operation_duration_seconds_bucket", le=bound) == count
    assert value(seen, "mxfs_written_bytes_total", node=name) == 4096
    assert value(seen, "mxfs_takeovers_total", cause="fenced") == 2
    assert value(seen, "mxfs_last_takeover_duration_seconds") == 1.5
    assert value(seen, "mxfs_locks_held", node=name) == 2
    assert value(seen, "mxfs_nodes", state="active") == 2


def test_before_the_first_takeover_and_report_there_is_nothing_to_tell_of_them() -> None:
    seen = {**view("client"), "takeovers": {"free": 0, "fenced": 0}, "lease": {"age_ms": None, "left_ms": 0}}
    assert {"mxfs_last_takeover_duration_seconds", "mxfs_lease_age_seconds"}.isdisjoint(families(seen))


# -- scrapers ----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving(request_s: float = 5.0, host: str = "127.0.0.1", of: Any = None) -> AsyncIterator[MetricsServer]:
    made = MetricsServer(host, 0, lambda: of, request_s=request_s)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


async def ask(server: MetricsServer, request: bytes, host: str = "127.0.0.1") -> tuple[str, bytes]:
    reader, writer = await asyncio.open_connection(host, server.port)
    try:
        writer.write(request)
        head, _, body = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")
    finally:
        writer.close()
    return head.decode(), body


GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_scrape(host: str) -> None:
    async with serving(host=host, of=view()) as server:
        head, body = await ask(server, GET, host)
    assert head.startswith("HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=")
    assert f"Content-Length: {len(body)}\r\n" in head
    assert body == exposition(view())


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "404 Not Found"),
        (b"GET /metricsx HTTP/1.1\r\n\r\n", "404 Not Found"),
        (b"GET /metrics?name=x HTTP/1.0\r\n\r\n", "200 OK"),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", "200 OK"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", "405 Method Not Allowed"),
        (b"GET /metrics\r\n\r\n", "400 Bad Request"),
        (b"GET /metrics SPDY/3\r\n\r\n", "400 Bad Request"),
        (b"\n\n", "400 Bad Request"),
        (b"GET /" + b"x" * 20_000, "431 Request Header Fields Too Large"),
        (b"GET /metrics HTTP/1.1\r\n" + b"a: b\r\n" * 200, "431 Request Header Fields Too Large"),
    ],
)
async def test_other_requests(request_: bytes, status: str) -> None:
    async with serving(of=view()) as server:
        head, body = await ask(server, request_)
        assert head.startswith(f"HTTP/1.1 {status}\r\n")
        assert (len(body) > 1000) == (status == "200 OK" and not request_.startswith(b"HEAD"))


async def test_a_node_that_has_not_joined_says_so() -> None:
    async with serving() as server:
        assert (await ask(server, GET))[0].startswith("HTTP/1.1 503")


async def test_who_says_nothing_is_cut_off_and_others_are_served_meanwhile() -> None:
    async with serving(0.3, of=view()) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(GET[:20])
        assert (await ask(server, GET))[0].startswith("HTTP/1.1 200")
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()


async def test_who_does_not_read_is_cut_off() -> None:
    async with serving(0.5, of=view()) as server:
        server._exposition = lambda _view: bytes(64 << 20)
        sock = socket.create_connection(("127.0.0.1", server.port))
        try:
            sock.sendall(GET)
            async with asyncio.timeout(10):
                while not server._tasks:
                    await asyncio.sleep(0.01)
                while server._tasks:
                    await asyncio.sleep(0.01)
            assert (await asyncio.to_thread(received, sock)) < 64 << 20
        finally:
            sock.close()


def received(sock: socket.socket) -> int:
    size = 0
    with contextlib.suppress(ConnectionError):
        while part := sock.recv(1 << 20):
            size += len(part)
    return size


async def test_one_too_many_is_cut_off_at_once() -> None:
    async with serving(30, of=view()) as server:
        silent = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(CONNECTIONS)]
        async with asyncio.timeout(10):
            while len(server._tasks) < CONNECTIONS:
                await asyncio.sleep(0.01)
        with contextlib.suppress(ConnectionError):
            assert await ask(server, GET) == ("", b"")
        silent[0][1].close()
        async with asyncio.timeout(10):
            while len(server._tasks) == CONNECTIONS:
                await asyncio.sleep(0.01)
        assert (await ask(server, GET))[0].startswith("HTTP/1.1 200")
        for _, writer in silent:
            writer.close()


@pytest.mark.error_logs
async def test_a_bug_ends_one_answer_only(log_guard: list[str]) -> None:
    async with serving(of={"volume": "v"}) as server:
        with contextlib.suppress(ConnectionError):
            assert await ask(server, GET) == ("", b"")
        assert not server._tasks
    assert "metrics could not be told" in log_guard[0]


# -- ports -------------------------------------------------------------------------------------------------------


class Host:
    """What ``begin`` takes of a daemon."""

    def __init__(self, run_dir: Path, metrics: str) -> None:
        self.options = parse(metrics)
        self.run_dir = run_dir
        self.held = None
        self.tasks: list[asyncio.Task[None]] = []

    def spawn(self, work: Any) -> None:
        self.tasks.append(asyncio.get_running_loop().create_task(work))


@pytest.fixture
def taken() -> Any:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


async def test_without_the_option_nothing_listens(tmp_path: Path) -> None:
    assert await metricsserver.begin(Host(tmp_path, "")) is None  # type: ignore[arg-type]


async def test_a_port_that_is_taken_is_an_error_in_one_line(tmp_path: Path, taken: socket.socket) -> None:
    port = taken.getsockname()[1]
    with pytest.raises(IoFailure) as caught:
        await metricsserver.begin(Host(tmp_path, f"metrics={port}"))  # type: ignore[arg-type]
    assert str(caught.value) == (
        f"metrics=127.0.0.1:{port}: another program, or another volume, has this port: each volume needs one of its own"
    )


async def test_an_address_of_another_host_is_an_error_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(IoFailure) as caught:
        await metricsserver.begin(Host(tmp_path, "metrics=192.0.2.1:9188"))  # type: ignore[arg-type]
    assert str(caught.value) == "metrics=192.0.2.1:9188: this host has no such address"


async def test_under_a_live_mount_a_port_that_is_taken_is_waited_for(
    tmp_path: Path, taken: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metricsserver, "_RETRY_S", 0.02)
    rundir.remember(tmp_path, rundir.FUSE, 1)
    host = Host(tmp_path, f"metrics={taken.getsockname()[1]}")
    server = await metricsserver.begin(host)  # type: ignore[arg-type]
    assert server is not None
    await asyncio.sleep(0.1)
    (retrying,) = host.tasks
    assert not retrying.done()
    taken.close()
    await asyncio.wait_for(retrying, 10)
    assert (await ask(server, GET))[0].startswith("HTTP/1.1 503")
    await server.close()
