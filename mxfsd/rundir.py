"""What the processes of a volume on a node leave in its run directory, so that later ones find the earlier ones.

A process is named by its pid and its start time: a pid alone may have been given to another process since.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

DAEMON = "daemon.pid"
FUSE = "fuse.pid"
"""The FUSE layer. While it lives, a daemon that starts goes on with it instead of mounting."""
HEARTBEAT = "heartbeat.pid"
FLUSHED = "lower.flushed"
"""The heartbeat process that wrote this has shut the lower mount down, everything written back before."""
DEAD = "mount.dead"
"""Why the mount answers nothing but EIO any more; the FUSE layer writes it when it has given up."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process: *start* is its start time in clock ticks after boot (field 22 of /proc/PID/stat, proc(5))."""

    pid: int
    start: int

    @property
    def alive(self) -> bool:
        """Whether it runs still (one that only waits to be reaped does not)."""
        found = _stat(self.pid)
        return found is not None and found[0] not in (b"Z", b"X") and int(found[19]) == self.start


def _stat(pid: int) -> list[bytes] | None:
    """Return the fields of /proc/PID/stat from the third on."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()
    except OSError:
        return None


def process(pid: int) -> Process | None:
    """Return the process that has *pid* now, or None."""
    found = _stat(pid)
    return None if found is None else Process(pid, int(found[19]))


def remember(run_dir: str | Path, name: str, pid: int) -> None:
    """Write down who process *name* is, whole or not at all. Raises OSError."""
    found = process(pid)
    if found is None:
        return
    path = os.path.join(run_dir, name)
    with open(f"{path}.new", "w", encoding="ascii") as file:
        json.dump([found.pid, found.start], file)
    os.replace(f"{path}.new", path)


def recall(run_dir: str | Path, name: str) -> Process | None:
    """Return who was written down as *name*, or None."""
    try:
        with open(os.path.join(run_dir, name), encoding="ascii") as file:
            pid, start = json.load(file)
        return Process(int(pid), int(start))
    except (OSError, ValueError, TypeError):
        return None


def was_flushed(run_dir: str | Path, heartbeat: Process) -> bool:
    """Whether that heartbeat process left word that it flushed the lower mount before it shut it down."""
    return recall(run_dir, FLUSHED) == heartbeat


def forget(run_dir: str | Path, *names: str) -> None:
    """Remove what was written down. Raises OSError."""
    for name in names:
        try:
            os.unlink(os.path.join(run_dir, name))
        except FileNotFoundError:
            pass
