"""``mxfs top``: what a volume does just now, again and again, from differences of what its home's daemon counts.

Pure: `between` makes the record of an interval from two status replies, `text` a page of that. The rest is the loop
that asks, and a terminal that is left as it was found.
"""

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mxfs_proto.errors import MisuseError, MxfsError
from mxfsd.cli.render import age, size
from mxfsd.cli.table import table
from mxfsd.figures import BUCKETS_S, quantile

ASK_S = 5.0
INTERVAL_MIN_S, INTERVAL_MAX_S = 0.1, 3600.0
COUNT_MAX = 1_000_000_000
_LOOK_S = 0.2
_EXIT_TERMINATED = 128 + signal.SIGTERM
_CLEAR, _HIDE, _SHOW = "\x1b[H\x1b[2J", "\x1b[?25l", "\x1b[?25h"

_NODE_COUNTERS = ("bytes_read", "bytes_written", "basts")
_TOTALS = ("log_forces", "grants", "waits")


# -- rates -------------------------------------------------------------------------------------------------------------


def between(before: dict[str, Any] | None, after: dict[str, Any]) -> dict[str, Any]:
    """Return the record of the interval between two replies; *before* is None where there was none.

    ``gap`` is empty, or says why there are no rates: what is counted may have gone back, or belong to another home.
    """
    record = {name: after[name] for name in ("volume", "label", "mountpoint", "node", "home", "epoch", "state", "role")}
    record |= {"gap": _gap(before, after), "seconds": None, "rates": {}, "operations": []}
    record["running"] = after["figures"]["here"].get("running")
    record["nodes"] = [
        {name: node[name] for name in ("slot", "name", "state", "home", "age_ms")} for node in after["nodes"]
    ]
    if not record["gap"]:
        assert before is not None
        try:
            _add_rates(record, before, after)
        except _WentBack:
            record |= {"gap": "counters have gone back", "seconds": None, "rates": {}, "operations": []}
    now = {row["slot"]: row for row in after["figures"]["nodes"]}
    for node in record["nodes"]:
        row = now.get(node["slot"], {})
        node |= {"locks": row.get("held"), "waiting": row.get("waiting")}
        if record["gap"]:
            node["rates"] = {}
    return record


class _WentBack(Exception):
    """A counter is less than it was."""


def _gap(before: dict[str, Any] | None, after: dict[str, Any]) -> str:
    if after["role"] != "home":
        return f"operations are counted at the home: mxfs top on {after['home'] or 'the home'}"
    if before is None:
        return "measuring"
    if before["incarnation"] != after["incarnation"]:
        return "the daemon was started again"
    if (before["role"], before["epoch"]) != (after["role"], after["epoch"]):
        return "the home has moved"
    if after["figures"]["now_s"] <= before["figures"]["now_s"]:
        return "no time has passed"
    return ""


def _less(after: float, before: float) -> float:
    if after < before:
        raise _WentBack
    return after - before


def _times(counts: list[int], seconds: float) -> dict[str, Any]:
    return {
        "operations": sum(counts) / seconds,
        "median_s": quantile(counts, 0.5),
        "p99_s": quantile(counts, 0.99),
    }


def _add_rates(record: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> None:
    seconds = after["figures"]["now_s"] - before["figures"]["now_s"]
    then = {(row["slot"], row["node"]): row for row in before["figures"]["nodes"]}
    none = [0] * (len(BUCKETS_S) + 1)
    by_op: dict[str, list[int]] = {}
    by_slot: dict[int, dict[str, Any]] = {}
    whole = [*none]
    for row in after["figures"]["nodes"]:
        # A node that was not there before, or another one in its slot, has begun at nothing since.
        old = then.get((row["slot"], row["node"]), {})
        counts = [*none]
        for op, histogram in row["operations"].items():
            earlier = old.get("operations", {}).get(op, {"counts": none})["counts"]
            new = [int(_less(a, b)) for a, b in zip(histogram["counts"], earlier, strict=True)]
            counts = [a + b for a, b in zip(counts, new, strict=True)]
            by_op[op] = [a + b for a, b in zip(by_op.get(op, none), new, strict=True)]
        whole = [a + b for a, b in zip(whole, counts, strict=True)]
        rates = {name: _less(row[name], old.get(name, 0)) / seconds for name in _NODE_COUNTERS}
        by_slot[row["slot"]] = _times(counts, seconds) | rates
    totals = {name: _less(after["totals"][name], before["totals"][name]) / seconds for name in _TOTALS}
    record["seconds"] = seconds
    record["rates"] = _times(whole, seconds) | totals
    for node in record["nodes"]:
        node["rates"] = by_slot.get(node["slot"], {})
    busiest = sorted(by_op.items(), key=lambda item: (-sum(item[1]), item[0]))
    record["operations"] = [{"op": op, **_times(counts, seconds)} for op, counts in busiest if sum(counts)]


# -- text --------------------------------------------------------------------------------------------------------------


def rate(value: float | None) -> str:
    """Return so many a second, with a digit behind the point where it is small."""
    if value is None:
        return "-"
    return f"{value:.1f}" if 0 < value < 10 else f"{value:.0f}"


def duration(seconds: float | None) -> str:
    """Return a time with two or three digits; ``>10 s`` where no more is known."""
    if seconds is None:
        return "-"
    if seconds >= BUCKETS_S[-1]:
        return f">{BUCKETS_S[-1]:g} s"
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1000:.2f} ms" if seconds < 0.01 else f"{seconds * 1000:.0f} ms"


def _speed(value: float | None) -> str:
    return "-" if value is None else f"{size(round(value))}/s"


def text(record: dict[str, Any], width: int | None = None, height: int | None = None) -> str:
    """Return a page of one record: no line longer than *width*, no more lines than *height*."""
    lines = [_head(record), _summary(record)]
    nodes, operations = record["nodes"], record["operations"]
    room = height - len(lines) - 2 if height is not None else 1_000_000  # for both tables; a blank and a head each
    least = 2 + min(3, len(operations)) if operations else 0
    if len(nodes) > max(1, room - least):
        nodes = sorted(nodes, key=lambda node: -node["rates"].get("operations", 0))[: max(1, room - least - 1)]
    lines += ["", *_node_table(nodes).split("\n")]
    if len(nodes) < len(record["nodes"]):
        lines.append(f"  and {len(record['nodes']) - len(nodes)} nodes that do less")
    left = height - len(lines) - 2 if height is not None else len(operations)
    if operations and left > 0:
        lines += ["", *_op_table(operations[:left]).split("\n")]
    return "\n".join(line if width is None else line[:width] for line in lines[:height])


def _head(record: dict[str, Any]) -> str:
    what = record["label"] or record["volume"]
    home = f"home {record['home'] or 'none'}, epoch {record['epoch']}, {record['state']}"
    return f"{what} at {record['mountpoint']}: {home}, {len(record['nodes'])} nodes"


def _summary(record: dict[str, Any]) -> str:
    if record["gap"]:
        return f"  {record['gap']}"
    rates = record["rates"]
    return (
        f"  {record['seconds']:.1f} s: {rate(rates['operations'])} operations/s, {record['running']} running, "
        f"{rate(rates['log_forces'])} log forces/s, {rate(rates['waits'])} waits/s"
    )


def _node_table(nodes: list[dict[str, Any]]) -> str:
    rows = []
    for node in nodes:
        rates = node["rates"]
        rows.append(
            [
                f"{node['name']}*" if node["home"] else node["name"],
                rate(rates.get("operations")),
                duration(rates.get("median_s")),
                duration(rates.get("p99_s")),
                _speed(rates.get("bytes_read")),
                _speed(rates.get("bytes_written")),
                "-" if node["locks"] is None else node["locks"],
                rate(rates.get("basts")),
                f"{age(node['age_ms'])}" if node["state"] == "active" else node["state"],
            ]
        )
    head = ["node", "ops/s", "median", "99%", "read", "written", "locks", "BASTs/s", "beat"]
    return table(head, rows, indent="", right=range(1, len(head)))


def _op_table(operations: list[dict[str, Any]]) -> str:
    rows = [
        [row["op"].lower(), rate(row["operations"]), duration(row["median_s"]), duration(row["p99_s"])]
        for row in operations
    ]
    return table(["operation", "ops/s", "median", "99%"], rows, indent="", right=(1, 2, 3))


# -- the terminal ------------------------------------------------------------------------------------------------------


class _Quit(Exception):
    """q was typed."""


class _Pipe:
    """Where the output is no terminal: a page an interval."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._begun = False

    def show(self, record: dict[str, Any], *, passing: bool = False) -> None:
        """Print a record, but not one that is *passing*: about no interval."""
        if passing:
            return
        if self._as_json:
            import json

            print(json.dumps(record), flush=True)
            return
        print(("\n" if self._begun else "") + _page(record), flush=True)
        self._begun = True

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        time.sleep(seconds)


class _Terminal:
    """A terminal whose keys are read one by one, and which shows one page at a time."""

    def __init__(self) -> None:
        self._page: Callable[[int, int], str] = lambda _width, _height: ""
        self._size = (0, 0)
        self._keys = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else -1
        self._ended_by = 0
        """The signal that ends it: wait() raises too, since what a handler raises is lost in a finalizer."""

    @contextlib.contextmanager
    def taken(self) -> Iterator["_Terminal"]:
        """Hide the cursor and read keys, until the end; then the terminal is as it was, whatever the end."""
        import termios
        import tty

        def ended(number: int, _frame: object) -> None:
            self._ended_by = number
            self._raise_if_ended()

        saved = termios.tcgetattr(self._keys) if self._keys >= 0 else None
        handlers = {number: signal.signal(number, ended) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            if saved is not None:
                tty.setcbreak(self._keys)
            sys.stdout.write(_HIDE)
            yield self
        finally:
            if saved is not None:
                termios.tcsetattr(self._keys, termios.TCSADRAIN, saved)
            with contextlib.suppress(OSError):
                sys.stdout.write(f"{_SHOW}\n")
                sys.stdout.flush()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _raise_if_ended(self) -> None:
        if self._ended_by == signal.SIGINT:
            raise KeyboardInterrupt
        if self._ended_by:
            raise SystemExit(_EXIT_TERMINATED)

    def show(self, record: dict[str, Any], *, passing: bool = False) -> None:
        """Draw a record, in place of the one before."""
        del passing
        self._page = lambda width, height: _page(record, width, height)
        self._draw()

    def _draw(self) -> None:
        self._size = tuple(shutil.get_terminal_size())  # type: ignore[assignment]
        # One line less: the cursor stands in the last one.
        sys.stdout.write(_CLEAR + self._page(self._size[0], max(1, self._size[1] - 1)))
        sys.stdout.flush()

    def wait(self, seconds: float) -> None:
        """Let time pass; draw anew when the size of the terminal has changed. Raises _Quit, and what signals raise."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._raise_if_ended()
            ready = select.select([self._keys] if self._keys >= 0 else [], [], [], min(_LOOK_S, left))[0]
            if ready:
                typed = os.read(self._keys, 64)
                if not typed:
                    self._keys = -1
                if b"q" in typed.lower():
                    raise _Quit
            if tuple(shutil.get_terminal_size()) != self._size:
                self._draw()


def _page(record: dict[str, Any], width: int | None = None, height: int | None = None) -> str:
    if "error" in record:
        lines = [f"{record['label'] or record['volume']} at {record['mountpoint']}", f"  {record['error']}"]
        return "\n".join(line if width is None else line[:width] for line in lines[:height])
    return text(record, width, height)


# -- the command -------------------------------------------------------------------------------------------------------


def interval_of(word: str) -> float:
    """Return the seconds that *word* says. Raises MisuseError."""
    try:
        seconds = float(word)
    except ValueError:
        seconds = 0.0
    if not INTERVAL_MIN_S <= seconds <= INTERVAL_MAX_S:  # no NaN either
        raise MisuseError(f"--interval {word}: must be seconds from {INTERVAL_MIN_S:g} to {INTERVAL_MAX_S:g}")
    return seconds


def count_of(word: str | None) -> int | None:
    """Return how many intervals *word* says, None for no end. Raises MisuseError."""
    if word is None:
        return None
    if not (word.isascii() and word.isdigit() and len(word) <= 10 and 1 <= int(word) <= COUNT_MAX):
        raise MisuseError(f"--count {word}: must be a number of intervals, 1 or more")
    return int(word)


def run(path: Path, interval_s: float, count: int | None, as_json: bool) -> int:
    """Show the volume whose daemon listens at *path* until the count, q or Ctrl-C."""
    with contextlib.suppress(_Quit, KeyboardInterrupt):
        if as_json or not sys.stdout.isatty():
            _loop(_Pipe(as_json), path, interval_s, count)
        else:
            with _Terminal().taken() as terminal:
                _loop(terminal, path, interval_s, count)
    return 0


def _loop(out: "_Pipe | _Terminal", path: Path, interval_s: float, count: int | None) -> None:
    before = _ask(path)
    out.show(between(None, before), passing=True)
    last: dict[str, Any] | None = before
    shown = 0
    due = time.monotonic()
    while count is None or shown < count:
        due = max(due + interval_s, time.monotonic())
        out.wait(max(0.0, due - time.monotonic()))
        try:
            now = _ask(path)
            out.show(between(last, now))
            last = now
        except MxfsError as error:
            # Perhaps it is being started again. What it says then cannot be compared with what was before.
            last = None
            names = {name: before[name] for name in ("volume", "label", "mountpoint")}
            out.show({**names, "error": str(error).removeprefix(f"{path}: ")})
        shown += 1


def _ask(path: Path) -> dict[str, Any]:
    from mxfsd import control

    reply = control.request(path, "status", ASK_S, figures=True)
    if reply.get("figures", {}).get("buckets_s") != list(BUCKETS_S):
        raise MisuseError(f"{reply['mountpoint']}: its daemon is of another version than mxfs top: mount again there")
    return reply
