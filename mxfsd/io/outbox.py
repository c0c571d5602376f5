"""Datagrams from the heartbeat process to its daemon."""

import json
import os
import socket
import threading
from collections import deque
from typing import Any

Message = dict[str, Any]


class Outbox:
    """Datagrams to the daemon, from both threads. Reports may be dropped, anything else is kept and in order."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._lock = threading.Lock()
        self._queue: deque[bytes] = deque()
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    @property
    def wake_fd(self) -> int:
        """Readable when the other thread wants attention."""
        return self._wake_r

    def wake(self) -> None:
        """Interrupt the poll of the main thread."""
        try:
            os.write(self._wake_w, b"x")
        except BlockingIOError:
            # A full pipe wakes just as well.
            return

    def drain(self) -> None:
        """Forget wake-ups, send what waits."""
        try:
            os.read(self._wake_r, 4096)
        except BlockingIOError:
            return
        finally:
            self.flush()

    def event(self, event: str, **detail: object) -> None:
        """Send an event."""
        self.put({"event": event, **detail})

    def put(self, message: Message) -> None:
        """Send *message*, later if the daemon is slow."""
        with self._lock:
            self._queue.append(json.dumps(message).encode())
        self.flush()

    def report(self, message: Message) -> None:
        """Send a report unless older messages wait: the next report says the same, newer."""
        with self._lock:
            if not self._queue:
                self._queue.append(json.dumps(message).encode())
        self.flush()

    def flush(self) -> bool:
        """Send what waits; return whether something is left."""
        with self._lock:
            while self._queue:
                try:
                    self.sock.send(self._queue[0], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                except BlockingIOError:
                    return True
                except OSError:
                    # The daemon is gone; the main thread sees that by itself.
                    self._queue.clear()
                    return False
                self._queue.popleft()
        return False
