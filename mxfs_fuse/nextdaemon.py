"""The daemon is gone: start the next one, again and again, until one answers or the time for it is over.

Where systemd starts daemons the command line is empty, and there is only the time to watch.
"""

import os
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

import structlog

log = structlog.get_logger(__name__)

_FIRST_WAIT_MS = 50
_LONGEST_WAIT_MS = 2000
_KILLED_S = 1.0


class Child(Protocol):
    """A process that was started (subprocess.Popen)."""

    pid: int

    def poll(self) -> int | None:
        """Return its exit status, None while it runs."""

    def kill(self) -> None:
        """Send it SIGKILL."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, up to *timeout* seconds. Raises subprocess.TimeoutExpired."""


def launch(command: Sequence[str]) -> Child:
    """Start a daemon that outlives this process and goes on with no other; it has the same log. Raises OSError."""
    words = [*command, "--fuse-pid", str(os.getpid())]
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)


class NextDaemon:
    """One outage. *limit_ms*: how long it may last; times are the caller's monotonic milliseconds."""

    def __init__(
        self,
        command: Sequence[str],
        limit_ms: int,
        now_ms: int,
        start: Callable[[Sequence[str]], Child] = launch,
    ) -> None:
        self._command = command
        self._start = start
        self._until_ms = now_ms + limit_ms
        self._due_ms = now_ms
        self._wait_ms = _FIRST_WAIT_MS
        self._child: Child | None = None
        self.starts = 0

    def step(self, now_ms: int, connected: bool) -> bool:
        """Start a daemon if none runs and it is time for one. False: the outage has lasted too long.

        A daemon that is *connected* is on its way: it may have to wait for a home, or for the disk.
        """
        if self._child is not None:
            status = self._child.poll()
            if status is not None:
                log.warning("the daemon has ended", daemon_pid=self._child.pid, status=status)
                self._child = None
                self._due_ms = now_ms + self._wait_ms
                self._wait_ms = min(2 * self._wait_ms, _LONGEST_WAIT_MS)
        if connected:
            return True
        if now_ms >= self._until_ms:
            return False
        if self._child is None and self._command and now_ms >= self._due_ms:
            self._launch(now_ms)
        return True

    def abandon(self) -> None:
        """Nobody waits for a daemon any more: end one that is on its way and has not connected.

        It claims nothing before it is connected, and it must not meet the next mount in the run directory.
        """
        child, self._child = self._child, None
        if child is not None and child.poll() is None:
            log.info("the daemon on its way is ended", daemon_pid=child.pid)
            child.kill()
            with suppress(subprocess.TimeoutExpired):
                child.wait(_KILLED_S)

    def _launch(self, now_ms: int) -> None:
        try:
            self._child = self._start(self._command)
        except OSError as exc:
            log.error("the daemon cannot be started", reason=str(exc))
            self._due_ms = now_ms + self._wait_ms
            self._wait_ms = min(2 * self._wait_ms, _LONGEST_WAIT_MS)
            return
        self.starts += 1
        log.info("the daemon is started again", daemon_pid=self._child.pid, time=self.starts)
