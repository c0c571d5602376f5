"""Two network namespaces joined by a veth pair, for tests in one process."""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

CLONE_NEWNET = 0x40000000


class Namespaces:
    """Two network namespaces joined by a veth pair; sockets stay in the one they were made in."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        self.fds: list[int] = []

    def _call(self, result: int) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), "network namespace")

    def build(self) -> None:
        for _ in range(2):
            self._call(self._libc.unshare(CLONE_NEWNET))
            self.fds.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY))
        # This thread, and so its children and /proc/PID/ns/net, are in the second namespace now.
        in_first = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{self.fds[0]}"]
        for command in (
            [*in_first, "ip", "link", "add", "va", "type", "veth", "peer", "name", "vb", "netns", str(os.getpid())],
            [*in_first, "ip", "addr", "add", "10.77.0.1/24", "dev", "va"],
            [*in_first, "ip", "link", "set", "va", "up"],
            [*in_first, "ip", "link", "add", "other", "type", "veth", "peer", "name", "unused"],
            [*in_first, "ip", "link", "set", "other", "up"],
            ["ip", "addr", "add", "10.77.0.2/24", "dev", "vb"],
            ["ip", "link", "set", "vb", "up"],
        ):
            subprocess.run(command, check=True, capture_output=True)

    def enter(self, which: int) -> None:
        self._call(self._libc.setns(self.fds[which], CLONE_NEWNET))

    def close(self) -> None:
        self._call(self._libc.setns(self._home, CLONE_NEWNET))
        for fd in (self._home, *self.fds):
            os.close(fd)  # the last reference: the kernel removes namespace and interfaces


@contextmanager
def two_namespaces() -> Iterator[Namespaces]:
    """Make them for the length of a with block; afterwards this thread is where it was. Needs root and iproute2."""
    made = Namespaces()
    try:
        made.build()
        yield made
    finally:
        made.close()
