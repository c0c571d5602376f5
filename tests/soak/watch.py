"""The nodes' logs: who was put out and when, and every error."""

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PUT_OUT = ("a node is put out", "fencing the home")
"""What a home says of a client, and the next home of the one before it, when it takes it for dead."""


@dataclass(frozen=True, slots=True)
class PutOut:
    """Somebody was declared dead. *slot*: whose; *at*: seconds since 1970; *by*: the node whose log says so."""

    at: float
    by: str
    slot: int
    why: str


class Logs:
    """Reads what is new in the logs of a lab's nodes."""

    def __init__(self, folder: Path, nodes: list[str]) -> None:
        self._folder = folder
        self._nodes = nodes
        self._read: dict[Path, int] = {}
        self.errors: list[str] = []
        """Tracebacks and internal errors: never right, whatever is done to the nodes."""

    def news(self) -> list[PutOut]:
        """Return who was put out since the last call."""
        found = []
        for node in self._nodes:
            for line in self._lines(node):
                if line.get("event") in PUT_OUT:
                    why = str(line.get("reason") or line.get("verdict"))
                    found.append(PutOut(moment(str(line["timestamp"])), node, int(line["peer"]), why))
                if "exception" in line or "Traceback" in str(line.get("event")):
                    self.errors.append(f"{node}: {json.dumps(line)[:2000]}")
        return found

    def _lines(self, node: str) -> Iterable[dict[str, Any]]:
        for log in self._folder.glob(f".lab/{node}/run/*/*.log"):
            with suppress(OSError), open(log, "rb") as stream:
                stream.seek(self._read.get(log, 0))
                data = stream.read()
                whole = data.rfind(b"\n") + 1
                self._read[log] = self._read.get(log, 0) + whole
                for raw in data[:whole].splitlines():
                    try:
                        line = json.loads(raw)
                    except ValueError:
                        line = {"event": raw.decode(errors="replace")}
                    if isinstance(line, dict):
                        yield line


def moment(text: str) -> float:
    """Return the seconds since 1970 of a log line's time (ISO 8601, UTC)."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone(UTC).timestamp()


def spurious(put_out: PutOut, name: str, excused: list[tuple[str, float, float]]) -> bool:
    """Whether node *name* was put out for nothing. *excused*: (node, from, until) in seconds since 1970."""
    return not any(node == name and begin <= put_out.at <= end for node, begin, end in excused)
