"""A TCP relay between one guest and the storage target: a path to the disk that can be slow, silent, or cut."""

import heapq
import itertools
import selectors
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

from netspace import NetSpace

HOST = "127.0.0.1"
CHUNK = 262_144
HELD_MAX = 4 << 20
"""Bytes of one direction that the relay holds before it stops reading."""


@dataclass
class _Side:
    """One direction's end: what is due for *socket*, and when."""

    socket: socket.socket
    other: "_Side | None" = None
    waiting: list[tuple[float, int, bytes]] = field(default_factory=list)
    size: int = 0


class Relay:
    """Listens on a port of its own in the namespace; every connection is joined to one to the target."""

    def __init__(self, space: NetSpace, target_port: int) -> None:
        self.delay_s = 0.0
        """Each piece is held back this long, in each direction."""
        self._silent = False
        self._cut = False
        self._target_port = target_port
        self._orders = itertools.count()
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = space.call(lambda: _server(0))
        self.port = int(self._listener.getsockname()[1])
        self._waker, self._wake = socket.socketpair()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._waker, selectors.EVENT_READ)
        self._sides: dict[socket.socket, _Side] = {}
        self._ending = False
        self._thread: threading.Thread = space.thread(self._serve)

    def cut(self) -> None:
        """End all connections, and refuse new ones until ``restore``.

        Refused, not taken and closed: iscsid whose connection ends in the middle of a login binds the next ones in
        vain until the session's time is over (open-iscsi, issue 387).
        """
        self._cut = True
        self._wake.send(b"x")

    def silence(self) -> None:
        """Pass nothing on any more, but end no connection, until ``restore``."""
        self._silent = True
        self._wake.send(b"x")

    def restore(self) -> None:
        """Pass everything again, at once."""
        self._cut = self._silent = False
        self.delay_s = 0.0
        self._wake.send(b"x")

    def close(self) -> None:
        """End it."""
        self._ending = True
        self._wake.send(b"x")
        self._thread.join(10)

    def _serve(self) -> None:
        while not self._ending:
            for key, _ in self._selector.select(self._pause_s()):
                if key.fileobj is self._waker:
                    self._waker.recv(4096)
                elif key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj in self._sides:
                    self._receive(self._sides[key.fileobj])
            self._listen(not self._cut)
            if self._cut:
                for side in list(self._sides.values()):
                    self._drop(side)
            elif not self._silent:
                for side in list(self._sides.values()):
                    self._deliver(side)
        for side in list(self._sides.values()):
            self._drop(side)
        self._listen(False)
        self._waker.close()
        self._wake.close()
        self._selector.close()

    def _pause_s(self) -> float | None:
        if self._silent or self._cut:
            return None
        due = [side.waiting[0][0] for side in self._sides.values() if side.waiting]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _listen(self, wanted: bool) -> None:
        if wanted and self._listener is None:
            self._listener = _server(self.port)
            self._selector.register(self._listener, selectors.EVENT_READ)
        elif not wanted and self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def _accept(self) -> None:
        assert self._listener is not None
        with suppress(OSError):
            client, _ = self._listener.accept()
            try:
                server = socket.create_connection((HOST, self._target_port), 5)
            except OSError:
                client.close()
                return
            one, two = _Side(client), _Side(server)
            one.other, two.other = two, one
            for side in (one, two):
                side.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                side.socket.settimeout(20)
                self._sides[side.socket] = side
                self._selector.register(side.socket, selectors.EVENT_READ)

    def _receive(self, side: _Side) -> None:
        try:
            data = side.socket.recv(CHUNK)
        except OSError:
            data = b""
        other = side.other
        assert other is not None
        if not data:
            self._drop(side)
            return
        heapq.heappush(other.waiting, (time.monotonic() + self.delay_s, next(self._orders), data))
        other.size += len(data)
        if other.size > HELD_MAX:
            self._selector.unregister(side.socket)

    def _deliver(self, side: _Side) -> None:
        while side.waiting and side.waiting[0][0] <= time.monotonic():
            _, _, data = heapq.heappop(side.waiting)
            side.size -= len(data)
            try:
                side.socket.sendall(data)
            except OSError:
                self._drop(side)
                return
        source = side.other
        if source is not None and side.size <= HELD_MAX and source.socket in self._sides:
            with suppress(KeyError):  # it is registered already
                self._selector.register(source.socket, selectors.EVENT_READ)

    def _drop(self, side: _Side) -> None:
        for one in (side, side.other):
            if one is not None and one.socket in self._sides:
                del self._sides[one.socket]
                with suppress(KeyError):
                    self._selector.unregister(one.socket)
                one.socket.close()


def _server(port: int) -> socket.socket:
    listener = socket.create_server((HOST, port))
    listener.setblocking(False)
    return listener
