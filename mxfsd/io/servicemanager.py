"""What the daemon tells the service manager that started it: sd_notify(3), a datagram to the socket NOTIFY_SOCKET.

Without a service manager everything here does nothing.
"""

import os
import socket
from collections.abc import MutableMapping
from typing import Self

import structlog

log = structlog.get_logger(__name__)

SEND_S = 2.0
"""Longest wait for room in the manager's socket. A word of life does not wait: the next one comes soon."""
_STATUS_MAX = 500


class ServiceManager:
    """One manager. *address*: where it listens, empty for nowhere; *watchdog_ms*: its limit for silence, 0 for none."""

    def __init__(self, address: str = "", watchdog_ms: int = 0) -> None:
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._period_ms = watchdog_ms // 4
        self._alive_ms: int | None = None
        self._ready = False
        self._status = ""

    @classmethod
    def take(cls, environment: MutableMapping[str, str]) -> Self:
        """Take what the manager left in the environment; helpers of this process are not to speak in its name."""
        address = environment.pop("NOTIFY_SOCKET", "")
        usec, pid = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", "")
        ours = not pid or pid == str(os.getpid())
        return cls(address, int(usec) // 1000 if ours and usec.isdigit() else 0)

    def ready(self, status: str) -> None:
        """The mount answers."""
        self._ready = True
        self._status = status
        self._send(f"READY=1\nSTATUS={_line(status)}")

    def status(self, text: str) -> None:
        """Tell in words what the daemon does, where that has changed."""
        if text != self._status:
            self._status = text
            self._send(f"STATUS={_line(text)}", wait=False)

    def alive(self, now_ms: int) -> None:
        """The event loop gets to its work. To be called by that work, often: a quarter of the limit is the period."""
        if self._period_ms and (self._alive_ms is None or now_ms - self._alive_ms >= self._period_ms):
            self._alive_ms = now_ms
            self._send("WATCHDOG=1", wait=False)

    def leaving(self, status: str, *, clean: bool) -> None:
        """The daemon ends. A service that ends *clean* without ever having been ready would count as failed, and be
        started again, to mount what was just unmounted: it says so first, by itself, since STOPPING= wins where systemd
        finds both in one datagram (its service_notify_message)."""
        if clean and not self._ready:
            self._send("READY=1")
        self._send(f"STOPPING=1\nSTATUS={_line(status)}")

    def _send(self, text: str, *, wait: bool = True) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.settimeout(SEND_S if wait else 0)
                sock.sendto(text.encode(errors="replace"), self._address)
        except BlockingIOError:
            pass  # told again soon; who must know waits
        except OSError as exc:
            log.warning("the service manager was not told", reason=str(exc))


def _line(text: str) -> str:
    return " ".join(text.split())[:_STATUS_MAX]
