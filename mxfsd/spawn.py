"""Starting a volume's daemon and waiting for its one-line answer, without leaving a child behind.

The daemon writes one line into a pipe, ``ready`` or ``error: REASON``, and closes it. It runs in a session of its own
and is a child of init from the start, with its standard error in the log file; a mark in the environment tells it and
its helpers from other processes. With *netns* it runs in that network namespace and in the caller's mount namespace,
so that its mounts are seen outside.
"""

import errno
import os
import select
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from mxfs_proto.errors import IoFailure
from mxfsd import procs

TOKEN_ENV = "MXFS_DAEMON"
READY_LINE_MAX = 4096
TERM_S = 5.0
KILL_S = 5.0
_CLONE_NEWNET = 0x40000000
_CLONE_NEWNS = 0x00020000


class DaemonFailed(IoFailure):
    """The daemon said ``error: REASON``, ended, or was silent for too long; the message is one line."""


@dataclass(frozen=True, slots=True)
class Daemon:
    """A started daemon: its pid, and the mark that it and its helpers carry in their environment."""

    pid: int
    token: str

    def processes(self) -> list[int]:
        """Return those of its processes that live; helpers have sessions of their own, so a group would not do."""
        return procs.marked(f"{TOKEN_ENV}={self.token}")

    def wait_gone(self, timeout_s: float) -> bool:
        """Wait until none of its processes is left; return whether that came true in time."""
        return procs.wait_until(lambda: not self.processes(), timeout_s)

    def signal(self, signum: int) -> None:
        """Send a signal to each of its processes."""
        mark = f"{TOKEN_ENV}={self.token}"
        for pid in self.processes():
            procs.send(pid, signum, lambda number: procs.has_mark(number, mark))

    def end(self) -> None:
        """End every process: SIGTERM to the daemon first, SIGKILL for all that is left after TERM_S."""
        mark = f"{TOKEN_ENV}={self.token}"
        procs.send(self.pid, signal.SIGTERM, lambda number: procs.has_mark(number, mark))
        if not self.wait_gone(TERM_S):
            self.signal(signal.SIGKILL)
            self.wait_gone(KILL_S)


def setns(path: str | int, kind: int = _CLONE_NEWNET) -> None:
    """Move this thread into the namespace at *path* (setns(2)); OSError otherwise. *kind*: CLONE_NEW* of the path."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if isinstance(path, str) else path
    try:
        if libc.setns(fd, kind) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
    finally:
        if isinstance(path, str):
            os.close(fd)


def enter_mount_namespace(path: str) -> None:
    """Move this (single-threaded) process into the mount namespace at *path*, as mount -N asks for."""
    setns(path, _CLONE_NEWNS)


def launch(
    argv: Sequence[str],
    log_path: str,
    *,
    netns: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> tuple[Daemon, int]:
    """Start *argv* + ``--ready-fd N``; return the daemon and the reading end of its pipe, which the caller closes.

    Raises OSError when the log cannot be opened or the namespace is not there.
    """
    import ctypes  # noqa: F401 - loaded before the fork when a namespace is to be entered

    env = dict(os.environ if environment is None else environment)
    token = os.urandom(8).hex()
    env[TOKEN_ENV] = token
    log_fd = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    netns_fd = -1
    pid_read, pid_write = os.pipe()
    ready_read, ready_write = os.pipe()
    try:
        if netns is not None:
            netns_fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
        first = os.fork()
        if first == 0:
            _child(argv, env, log_fd, netns_fd, pid_write, ready_write)
        os.close(pid_write)
        pid_write = -1
        os.waitpid(first, 0)
        text = b""
        while part := os.read(pid_read, 32):
            text += part
        if not text:
            raise DaemonFailed("the daemon's process could not be made", errno.EAGAIN)
        kept, ready_read = ready_read, -1
        return Daemon(int(text), token), kept
    finally:
        for fd in (log_fd, netns_fd, pid_read, pid_write, ready_read, ready_write):
            if fd >= 0:
                os.close(fd)


def _child(argv: Sequence[str], env: Mapping[str, str], log_fd: int, netns_fd: int, pid_fd: int, ready_fd: int) -> None:
    """The forked child: becomes a session leader, forks again, and executes *argv* in the grandchild."""
    try:
        os.setsid()
        pid = os.fork()
        if pid:
            os.write(pid_fd, b"%d" % pid)
            os._exit(0)
        # pid_fd stays open until execve closes it: only from then on does the environment show the mark.
        os.chdir("/")
        os.umask(0o022)
        if netns_fd >= 0:
            setns(netns_fd)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.dup2(log_fd, 2)
        os.set_inheritable(ready_fd, True)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(signum, signal.SIG_DFL)
        os.execve(argv[0], [*argv, "--ready-fd", str(ready_fd)], env)
    except BaseException as error:  # noqa: BLE001 - nothing may escape into the parent's code after a fork
        with suppress(OSError):
            os.write(ready_fd, f"error: cannot start {argv[0]}: {error}\n".encode(errors="replace"))
    finally:
        os._exit(127)


def wait_ready(ready_fd: int, timeout_s: float, log_path: str) -> None:
    """Wait for the line on the pipe; return on ``ready``, raise DaemonFailed with a one-line reason otherwise."""
    deadline = time.monotonic() + timeout_s
    data = b""
    while b"\n" not in data and len(data) < READY_LINE_MAX:
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not select.select([ready_fd], [], [], left_s)[0]:
            raise DaemonFailed(not_ready(timeout_s, log_path), errno.ETIMEDOUT)
        part = os.read(ready_fd, READY_LINE_MAX)
        if not part:
            break
        data += part
    line = data.partition(b"\n")[0].decode(errors="replace").strip()
    if line == "ready":
        return
    if line.startswith("error:"):
        raise DaemonFailed(line.removeprefix("error:").strip() or "the daemon failed")
    raise DaemonFailed(ended_early(log_path))


def not_ready(timeout_s: float, log_path: str) -> str:
    """Return what to say of a daemon that was silent for too long."""
    return f"the daemon was not ready within {timeout_s:g} s{_said(log_path)}"


def ended_early(log_path: str) -> str:
    """Return what to say of a daemon that ended without a word."""
    return f"the daemon ended before it was ready{_said(log_path)}"


def _said(log_path: str) -> str:
    line = last_line(log_path)
    return f" (its last words: {line})" if line else ""


def last_line(path: str, most: int = 400) -> str:
    """Return the last line with text of a log file, cut to *most* characters; empty if there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return ""
    return next((line[:most] for line in reversed(lines) if line), "")
