"""``mxfs top``: rates over resets and moves, pages that fit, what is refused, and a terminal that is left as it was."""

import asyncio
import contextlib
import copy
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mxfs_proto.errors import IoFailure
from mxfs_proto.ops import Op
from mxfsd.cli import mxfs, top
from mxfsd.control import ControlServer
from mxfsd.figures import BUCKETS_S, Figures

UUID = "5bbb064e-197b-4499-8c84-1a3eed3b6914"


class Daemon:
    """Replies of a daemon whose counters a test moves."""

    def __init__(self, nodes: int = 2, role: str = "home") -> None:
        self.figures = Figures()
        for slot in range(1, nodes + 1):
            self.figures.joined(slot, f"n{slot}")
        self.now_s = 100.0
        self.totals = {"executed": 0, "grants": 0, "waits": 0, "log_forces": 0, "put_out": 0}
        self.fields: dict[str, Any] = {"role": role, "epoch": 7, "incarnation": 3, "home": "n1", "state": "serving"}
        self.nodes = [
            {"slot": slot, "name": f"n{slot}", "state": "active", "home": slot == 1, "age_ms": 100 * slot}
            for slot in range(1, nodes + 1)
        ]

    def work(self, slot: int, op: Op, times: int, seconds: float = 0.0009) -> None:
        for _ in range(times):
            self.figures.of(slot).ended(op, seconds)

    def reply(self) -> dict[str, Any]:
        rows = self.figures.nodes()
        if self.fields["role"] == "home":
            for row in rows:
                row |= {"held": 10 * row["slot"], "waiting": 0}
        here = {"running": 3} if self.fields["role"] == "home" else {}
        return copy.deepcopy(
            {
                "volume": UUID,
                "label": "data",
                "device": "/dev/sdb",
                "mountpoint": "/mnt/shared",
                "node": "n1",
                **self.fields,
                "nodes": self.nodes,
                "totals": self.totals,
                "figures": {"now_s": self.now_s, "buckets_s": list(BUCKETS_S), "nodes": rows, "here": here},
            }
        )


def interval(change: Callable[[Daemon], None], seconds: float = 2.0, daemon: Daemon | None = None) -> dict[str, Any]:
    """The record of an interval in which *change* happened."""
    daemon = daemon or Daemon()
    daemon.work(2, Op.CREATE, 50)
    before = daemon.reply()
    daemon.now_s += seconds
    change(daemon)
    return top.between(before, daemon.reply())


# -- rates -------------------------------------------------------------------------------------------------------


def test_rates_by_node_and_operation() -> None:
    def change(daemon: Daemon) -> None:
        daemon.work(2, Op.CREATE, 99)
        daemon.work(2, Op.READ, 1, 3.0)
        daemon.work(1, Op.READ, 4)
        daemon.figures.of(2).bytes_read += 4000
        daemon.figures.of(2).basts += 6
        daemon.totals["log_forces"] += 8

    record = interval(change)
    first, second = record["nodes"]
    assert (record["gap"], record["seconds"], record["running"]) == ("", 2.0, 3)
    assert (first["rates"]["operations"], second["rates"]["operations"]) == (2.0, 50.0)
    assert second["rates"]["bytes_read"] == 2000
    assert second["rates"]["basts"] == 3
    assert 0.0005 < second["rates"]["median_s"] < 0.001
    assert second["rates"]["p99_s"] == pytest.approx(0.001)
    assert (first["locks"], second["locks"]) == (10, 20)
    assert record["rates"]["operations"] == 52
    assert record["rates"]["log_forces"] == 4
    assert [(row["op"], row["operations"]) for row in record["operations"]] == [("CREATE", 49.5), ("READ", 2.5)]


def test_an_interval_without_work_has_rates_of_nothing() -> None:
    record = interval(lambda _daemon: None)
    assert (record["gap"], record["operations"], record["rates"]["operations"]) == ("", [], 0)
    assert record["rates"]["median_s"] is None


def changed(**fields: Any) -> Callable[[Daemon], None]:
    def change(daemon: Daemon) -> None:
        daemon.fields |= fields
        daemon.work(2, Op.CREATE, 1000)

    return change


def anew(daemon: Daemon) -> None:
    daemon.figures = Figures()
    daemon.figures.joined(2, "n2")
    daemon.work(2, Op.CREATE, 3)


def less_total(daemon: Daemon) -> None:
    daemon.totals["grants"] = -1


@pytest.mark.parametrize(
    ("change", "gap"),
    [
        (changed(incarnation=4), "the daemon was started again"),
        (changed(epoch=8), "the home has moved"),
        (changed(role="client", home="n2", epoch=8), "operations are counted at the home: mxfs top on n2"),
        (changed(role="client", home=""), "operations are counted at the home: mxfs top on the home"),
        (anew, "counters have gone back"),
        (less_total, "counters have gone back"),
    ],
)
def test_what_cannot_be_compared_is_a_gap(change: Callable[[Daemon], None], gap: str) -> None:
    record = interval(change)
    assert (record["gap"], record["seconds"], record["rates"], record["operations"]) == (gap, None, {}, [])
    assert [node["rates"] for node in record["nodes"]] == [{}, {}]
    page = top.text(record, 80, 24)
    assert gap in page
    assert re.search(r"^n2 +- +- +- ", page, re.M)


def test_the_interval_behind_a_gap_has_rates_again() -> None:
    daemon = Daemon()
    before = daemon.reply()
    changed(epoch=8)(daemon)
    daemon.now_s += 1
    moved = daemon.reply()
    assert top.between(before, moved)["gap"]
    daemon.now_s += 1
    daemon.work(2, Op.CREATE, 5)
    assert top.between(moved, daemon.reply())["rates"]["operations"] == 5


def test_a_home_that_came_here_begins_with_a_gap() -> None:
    daemon = Daemon(role="client")
    before = daemon.reply()
    daemon.fields |= {"role": "home", "epoch": 8}
    daemon.now_s += 1
    assert top.between(before, daemon.reply())["gap"] == "the home has moved"


def test_no_time_is_no_interval() -> None:
    assert interval(lambda _daemon: None, seconds=0)["gap"] == "no time has passed"


def test_a_node_that_joins_and_another_one_in_a_slot_count_from_nothing() -> None:
    def change(daemon: Daemon) -> None:
        daemon.figures.joined(2, "other")
        daemon.nodes[1]["name"] = "other"
        daemon.work(2, Op.CREATE, 4)
        daemon.figures.joined(3, "n3")
        daemon.nodes.append({"slot": 3, "name": "n3", "state": "active", "home": False, "age_ms": 1})
        daemon.work(3, Op.READ, 2)

    record = interval(change)
    assert [node["rates"]["operations"] for node in record["nodes"]] == [0, 2, 1]


# -- pages -------------------------------------------------------------------------------------------------------


def test_a_page() -> None:
    def change(daemon: Daemon) -> None:
        daemon.work(2, Op.CREATE, 7)
        daemon.work(1, Op.LOOKUP, 400, 0.2)
        daemon.figures.of(2).bytes_written += 5 << 20
        daemon.figures.of(1).basts += 1
        daemon.nodes[1]["state"] = "failed"

    assert top.text(interval(change)) == (
        "data at /mnt/shared: home n1, epoch 7, serving, 2 nodes\n"
        "  2.0 s: 204 operations/s, 3 running, 0 log forces/s, 0 waits/s\n"
        "\n"
        "node  ops/s   median      99%   read    written  locks  BASTs/s    beat\n"
        "n1*     200   175 ms   248 ms  0 B/s      0 B/s     10      0.5  100 ms\n"
        "n2      3.5  0.75 ms  0.99 ms  0 B/s  2.5 MiB/s     20        0  failed\n"
        "\n"
        "operation  ops/s   median      99%\n"
        "lookup       200   175 ms   248 ms\n"
        "create       3.5  0.75 ms  0.99 ms"
    )


@pytest.mark.parametrize(("width", "height"), [(80, 23), (80, 10), (40, 6), (20, 3), (1, 1), (300, 200)])
@pytest.mark.parametrize("nodes", [0, 1, 3, 64])
def test_a_page_fits(nodes: int, width: int, height: int) -> None:
    def change(daemon: Daemon) -> None:
        for slot in range(1, nodes + 1):
            for op in Op:
                daemon.work(slot, op, slot)

    daemon = Daemon(nodes) if nodes else Daemon(0)
    daemon.nodes = daemon.nodes[:nodes]
    lines = top.text(interval(change, daemon=daemon), width, height).split("\n")
    assert len(lines) <= height
    assert max(map(len, lines)) <= width


def test_where_there_is_no_room_the_busiest_are_shown() -> None:
    def change(daemon: Daemon) -> None:
        daemon.work(50, Op.READ, 10)

    page = top.text(interval(change, daemon=Daemon(64)), 80, 23)
    assert re.search(r"^n50 +5\.0", page, re.M)
    assert re.search(r"^  and \d+ nodes that do less$", page, re.M)
    assert "\nread " in page


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "-"), (0.0, "0.00 ms"), (0.00942, "9.42 ms"), (0.05, "50 ms"), (1.25, "1.2 s"), (10.0, ">10 s")],
)
def test_durations(seconds: float | None, shown: str) -> None:
    assert top.duration(seconds) == shown


@pytest.mark.parametrize(("value", "shown"), [(None, "-"), (0.0, "0"), (0.25, "0.2"), (9.96, "10.0"), (1234.5, "1234")])
def test_rates_as_text(value: float | None, shown: str) -> None:
    assert top.rate(value) == shown


# -- the command -------------------------------------------------------------------------------------------------


class Serving:
    """A control socket whose status is what ``reply`` gives."""

    def __init__(self, path: Path, reply: Callable[[], dict[str, Any]]) -> None:
        self.path = path
        self.reply = reply
        self.asked: list[dict[str, Any]] = []
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        assert self._started.wait(10)

    async def _status(self, fields: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(fields)
        reply = self.reply()
        return reply if fields.get("figures") else {name: reply[name] for name in reply if name != "figures"}

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        server = ControlServer(self.path, {"status": self._status})
        await server.start()
        self._started.set()
        await self._end.wait()
        await server.close()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join()


class Busy(Daemon):
    """A daemon for which each look is 2 s and 20 operations later."""

    def reply(self) -> dict[str, Any]:
        self.now_s += 2
        self.work(2, Op.CREATE, 20)
        return super().reply()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MXFS_RUN_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture
def serving(root: Path) -> Iterator[Serving]:
    made = Serving(root / UUID / "control.sock", Busy().reply)
    yield made
    made.stop()


def test_a_block_an_interval(serving: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    assert mxfs.main(["top", "--interval", "0.1", "--count", "2"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    first, second = out.split("\n\ndata at ")
    for block in (first, second):
        assert "  2.0 s: 10 operations/s" in block
        assert re.search(r"^create +10 ", block, re.M)


def test_json_is_an_object_a_line(serving: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    assert mxfs.main(["top", "data", "--interval", "0.1", "--count", "3", "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["rates"]["operations"] for record in records] == [10, 10, 10]
    assert records[0]["nodes"][1]["rates"]["operations"] == 10


def test_a_daemon_that_is_away_for_a_while_is_a_gap(
    serving: Serving, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0
    ask = top._ask

    def sometimes(path: Path) -> dict[str, Any]:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise IoFailure(f"{path}: no daemon is running (Connection refused)")
        return ask(path)

    monkeypatch.setattr(top, "_ask", sometimes)
    assert mxfs.main(["top", "--interval", "0.1", "--count", "4", "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record.get("gap", record.get("error")) for record in records] == [
        "",
        "no daemon is running (Connection refused)",
        "measuring",
        "",
    ]
    asked = 1
    assert mxfs.main(["top", "--interval", "0.1", "--count", "2"]) == 0
    assert "data at /mnt/shared\n  no daemon is running (Connection refused)\n" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["0", "-1", "0.05", "3601", "nan", "inf", "two", ""])
def test_a_bad_interval_is_refused(word: str, serving: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    assert mxfs.main(["top", f"--interval={word}"]) == 1
    assert capsys.readouterr().err == f"mxfs: --interval {word}: must be seconds from 0.1 to 3600\n"
    assert not serving.asked


@pytest.mark.parametrize("word", ["0", "-1", "1.5", "many", "²", "99999999999"])
def test_a_bad_count_is_refused(word: str, serving: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    assert mxfs.main(["top", f"--count={word}"]) == 1
    assert capsys.readouterr().err == f"mxfs: --count {word}: must be a number of intervals, 1 or more\n"
    assert not serving.asked


def test_no_volume_an_unknown_one_and_several(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mxfs.main(["top"]) == 1
    assert "no volume is mounted here" in capsys.readouterr().err
    daemon = Busy()
    first = Serving(root / UUID / "control.sock", daemon.reply)
    second = Serving(root / "b" / "control.sock", lambda: {**daemon.reply(), "volume": "b", "mountpoint": "/mnt/b"})
    try:
        assert mxfs.main(["top", "nosuch"]) == 1
        assert capsys.readouterr().err.startswith("mxfs: nosuch: no such volume is mounted here; there are ")
        assert mxfs.main(["top"]) == 1
        said = capsys.readouterr().err
        assert said.startswith("mxfs: several volumes are mounted here: name one of them; there are ")
        assert said.count("\n") == 1
        assert mxfs.main(["top", "/mnt/b", "--interval", "0.1", "--count", "1"]) == 0
    finally:
        first.stop()
        second.stop()


@pytest.mark.parametrize("figures", [{}, {"buckets_s": [1, 2]}])
def test_a_daemon_of_another_version_is_refused(
    figures: dict[str, Any], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Serving(root / UUID / "control.sock", lambda: {**Daemon().reply(), "figures": figures})
    try:
        assert mxfs.main(["top"]) == 1
    finally:
        made.stop()
    assert capsys.readouterr().err == (
        "mxfs: /mnt/shared: its daemon is of another version than mxfs top: mount again there\n"
    )


# -- the terminal ------------------------------------------------------------------------------------------------


class Terminal:
    """``mxfs top`` on a terminal of its own."""

    def __init__(self, columns: int = 80, lines: int = 24) -> None:
        self.fd, self._slave = pty.openpty()
        self.resize(columns, lines)
        self.before = termios.tcgetattr(self._slave)
        self.seen = ""
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mxfsd.cli.mxfs", "top", "--interval", "0.3"],
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def until(self, wanted: Callable[[str], object]) -> None:
        deadline = time.monotonic() + 20
        while not wanted(self.seen):
            assert time.monotonic() < deadline, self.seen
            if select.select([self.fd], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    self.seen += os.read(self.fd, 65536).decode()

    def pages(self) -> list[str]:
        return self.seen.replace("\r\n", "\n").split("\x1b[H\x1b[2J")[1:]

    def ended(self) -> int:
        code = self.process.wait(20)
        self.until(lambda seen: seen.rstrip().endswith("\x1b[?25h"))
        assert termios.tcgetattr(self._slave) == self.before
        assert "Traceback" not in self.seen
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.fd)
        os.close(self._slave)


@pytest.fixture
def terminal(serving: Serving) -> Iterator[Terminal]:
    made = Terminal()
    yield made
    made.close()


def test_q_ends_it_and_the_terminal_is_as_it_was(terminal: Terminal) -> None:
    terminal.until(lambda seen: "10 operations/s" in seen)
    assert "measuring" in terminal.pages()[0]
    attributes = termios.tcgetattr(terminal._slave)
    assert not attributes[3] & (termios.ICANON | termios.ECHO)
    os.write(terminal.fd, b"xq")
    assert terminal.ended() == 0
    for page in terminal.pages():
        assert page.count("\n") <= 23
        assert max(map(len, page.split("\n"))) <= 80


def test_control_c_ends_it(terminal: Terminal) -> None:
    terminal.until(lambda seen: "operations/s" in seen)
    os.write(terminal.fd, b"\x03")
    assert terminal.ended() == 0


class Finalized:
    """An object in whose finalizer a signal comes."""

    def __init__(self, number: signal.Signals) -> None:
        self._number = number

    def __del__(self) -> None:
        signal.raise_signal(self._number)


@pytest.mark.parametrize(
    ("number", "ends"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit)]
)
def test_a_signal_in_a_finalizer_ends_it_too(
    number: signal.Signals, ends: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python ignores what is raised there."""
    lost: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: lost.append(what.exc_type))
    with pytest.raises(ends), top._Terminal().taken() as shown:
        Finalized(number)
        assert lost == [ends]
        shown.wait(20)


def test_sigterm_ends_it(terminal: Terminal) -> None:
    terminal.until(lambda seen: "operations/s" in seen)
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.ended() == 128 + signal.SIGTERM


def test_a_new_size_is_drawn_without_waiting_for_the_interval(terminal: Terminal) -> None:
    terminal.until(lambda seen: "operations/s" in seen)
    terminal.resize(30, 8)
    terminal.until(lambda _seen: max(map(len, terminal.pages()[-1].split("\n"))) == 30)
    os.write(terminal.fd, b"q")
    assert terminal.ended() == 0
    assert max(map(len, terminal.pages()[-1].removesuffix("\n").split("\n"))) <= 36  # with what shows the cursor again


def test_a_daemon_that_goes_and_comes_back_is_said_and_followed(terminal: Terminal, serving: Serving) -> None:
    terminal.until(lambda seen: "operations/s" in seen)
    serving.stop()
    terminal.until(lambda seen: "no daemon is running" in seen)
    again = Serving(serving.path, Busy().reply)
    try:
        terminal.until(lambda _seen: "10 operations/s" in terminal.pages()[-1])
        os.write(terminal.fd, b"q")
        assert terminal.ended() == 0
    finally:
        again.stop()
