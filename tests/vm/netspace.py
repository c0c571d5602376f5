"""A network namespace with nothing but loopback, in which all traffic of the guests stays.

QEMU's user network is a process that opens sockets for its guest, and what the nodes announce is multicast: in a
namespace without any way out neither can leave the host.
"""

import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from mxfsd.spawn import setns

_T = TypeVar("_T")
_SET_UP = "ip link set lo up multicast on && ip route add 224.0.0.0/4 dev lo && echo up && exec sleep infinity"


class NetSpace:
    """A namespace, held by a process of its own until ``close``."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", _SET_UP],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self._holder.stdout is not None
        said = self._holder.stdout.readline().strip()
        if said != "up":
            self.close()
            raise RuntimeError(f"no network namespace: {said}")

    @property
    def path(self) -> str:
        """The file that setns(2) wants."""
        return f"/proc/{self._holder.pid}/ns/net"

    def prefix(self) -> Sequence[str]:
        """Words before a command that make it run in the namespace, as the same process."""
        return ("nsenter", f"--net={self.path}", "--")

    def call(self, act: Callable[[], _T]) -> _T:
        """Call *act* in the namespace: a socket that it makes belongs there, whoever uses it later."""
        results: list[_T] = []
        errors: list[BaseException] = []

        def inside() -> None:
            try:
                setns(self.path)
                results.append(act())
            except BaseException as error:  # noqa: BLE001  raised again below
                errors.append(error)

        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def thread(self, act: Callable[[], None]) -> threading.Thread:
        """Start a thread that lives in the namespace and runs *act*."""

        def inside() -> None:
            setns(self.path)
            act()

        started = threading.Thread(target=inside, daemon=True)
        started.start()
        return started

    def close(self) -> None:
        """End the holder; the namespace goes with the last process in it."""
        self._holder.kill()
        self._holder.wait()
        if self._holder.stdout is not None:
            self._holder.stdout.close()


def ended(pid: int) -> bool:
    """Whether a process is gone."""
    return not os.path.exists(f"/proc/{pid}")
