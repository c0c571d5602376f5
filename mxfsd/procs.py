"""Processes found by what /proc says of them: a mark in their environment, or files that they hold below a folder.

Nothing here touches the files themselves: on a FUSE mount whose server is dead or stopped that could block for ever
(readlink of /proc/PID/fd/N and reading /proc/PID/maps do not ask the file system).
"""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

_GONE = (FileNotFoundError, ProcessLookupError, PermissionError)


def _pids() -> Iterator[int]:
    own = os.getpid()
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != own:
            yield int(name)


def is_zombie(pid: int) -> bool:
    """Whether a process has ended and only waits to be reaped (or is gone altogether)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except _GONE:
        return True


def has_mark(pid: int, mark: str) -> bool:
    """Whether the environment that the process was started with has the entry ``NAME=value`` *mark*."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return os.fsencode(mark) in file.read().split(b"\0")
    except _GONE:
        return False


def has_variable(pid: int, name: str) -> bool:
    """Whether a process was started with the environment variable *name*, whatever its value."""
    start = os.fsencode(name) + b"="
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return any(entry.startswith(start) for entry in file.read().split(b"\0"))
    except _GONE:
        return False


def marked(mark: str) -> list[int]:
    """Return the live processes, but this one, that carry *mark* (``NAME=value``) in their environment."""
    return [pid for pid in _pids() if has_mark(pid, mark) and not is_zombie(pid)]


def holds(pid: int, folder: str) -> bool:
    """Whether a process has its root, work folder, program, a descriptor or a mapping at or below *folder*."""
    base = f"/proc/{pid}"
    below = folder.rstrip("/") + "/"
    try:
        links = [f"{base}/cwd", f"{base}/root", f"{base}/exe"]
        links.extend(f"{base}/fd/{name}" for name in os.listdir(f"{base}/fd"))
        for link in links:
            with suppress(OSError):
                path = os.readlink(link)
                # The kernel appends " (deleted)" to the path of an unlinked file.
                if path == folder or path.startswith(below):
                    return True
        with open(f"{base}/maps", "rb") as maps:
            for line in maps:
                path = os.fsdecode(line.rstrip(b"\n").split(b" ", 5)[-1].lstrip())
                if path.startswith(below):
                    return True
    except _GONE:
        pass  # it ended while we looked: it holds nothing any more
    return False


def holders(folder: str) -> list[int]:
    """Return the live processes, but this one, that hold something at or below the absolute path *folder*."""
    return [pid for pid in _pids() if holds(pid, folder)]


def describe(pids: Iterable[int]) -> str:
    """Return ``pid NAME`` for each process, for messages."""
    words = []
    for pid in pids:
        name = "?"
        with suppress(*_GONE):
            with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
                name = file.read().strip()
        words.append(f"{pid} {name}")
    return ", ".join(words)


def send(pid: int, signum: int, still: Callable[[int], bool]) -> None:
    """Send a signal to a process if it still is what *still* says: a pid may have been given to another by now."""
    try:
        fd = os.pidfd_open(pid)
    except _GONE:
        return
    try:
        if still(pid):
            with suppress(*_GONE):
                signal.pidfd_send_signal(fd, signum)
    finally:
        os.close(fd)


def wait_until(condition: Callable[[], bool], timeout_s: float, step_s: float = 0.02) -> bool:
    """Wait until *condition* holds; return whether it did within *timeout_s* seconds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(step_s)
    return True
