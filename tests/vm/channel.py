"""The host's end of the one channel to a guest: commands over a virtio-serial port (see guest/agent.py)."""

import base64
import itertools
import json
import shlex
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

CONNECT_S = 30.0
MARGIN_S = 30.0
"""A guest that is asked to end a command after its time limit is given this much longer to say so."""


class GuestError(Exception):
    """A guest did not do what was asked; the text says what it said."""


@dataclass(frozen=True, slots=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass
class Command:
    """A command in a guest: its output so far, and its exit code once it has ended."""

    number: int
    words: str
    channel: "Channel"
    out: bytearray = field(default_factory=bytearray)
    err: bytearray = field(default_factory=bytearray)
    code: int | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def lines(self) -> list[str]:
        """Return the whole lines of its output that have come here so far."""
        text = bytes(self.out).decode(errors="replace")
        return text[: text.rfind("\n") + 1].splitlines()

    def wait(self, timeout_s: float) -> Done:
        """Wait for its end. GuestError when it does not come, or the guest is gone."""
        if not self.ended.wait(timeout_s):
            raise GuestError(f"{self.channel.name}: no end of {self.words!r} within {timeout_s:.0f} s{self._so_far()}")
        if self.code is None:
            raise GuestError(f"{self.channel.name}: the guest went away during {self.words!r}{self._so_far()}")
        return Done(self.code, bytes(self.out).decode(errors="replace"), bytes(self.err).decode(errors="replace"))

    def wait_lines(self, count: int, timeout_s: float) -> list[str]:
        """Wait for *count* whole lines of output. GuestError when they do not come."""
        deadline = time.monotonic() + timeout_s
        while len(self.lines()) < count:
            if self.ended.is_set() or time.monotonic() > deadline:
                raise GuestError(f"{self.channel.name}: not {count} lines from {self.words!r}{self._so_far()}")
            time.sleep(0.05)
        return self.lines()

    def signal(self, signum: int) -> None:
        """Send a signal to its process group."""
        self.channel.send(id=self.number, signal=signum)

    def _so_far(self) -> str:
        return f"; output:\n{bytes(self.out[-2000:] + self.err[-2000:]).decode(errors='replace')}"


class Channel:
    """One guest's port."""

    def __init__(self, name: str, path: Path) -> None:
        """Connect to QEMU's end, a Unix socket that it makes when it starts."""
        self.name = name
        self._socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + CONNECT_S
        while True:
            try:
                self._socket.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    self._socket.close()
                    raise GuestError(f"{name}: QEMU does not listen on {path}") from None
                time.sleep(0.05)
        self.ready = threading.Event()
        self.gone = threading.Event()
        self._commands: dict[int, Command] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def send(self, **fields: object) -> None:
        """Send one line."""
        with self._lock:
            try:
                self._socket.sendall(json.dumps(fields).encode() + b"\n")
            except OSError as error:
                raise GuestError(f"{self.name}: {error}") from None

    def start(self, command: str | Sequence[str], timeout_s: float = 600.0, stdin: bytes = b"") -> Command:
        """Start a command (a string is for the shell), which the guest ends after *timeout_s*."""
        argv = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
        words = command if isinstance(command, str) else shlex.join(command)
        return self._start(words, argv=argv, timeout=timeout_s, stdin=base64.b64encode(stdin).decode())

    def ask(self, request: str, timeout_s: float = 20.0) -> Done:
        """Send a request to the control sockets of the daemons there; the output has a line of JSON of each."""
        return self._start(f"control: {request}", ask=request).wait(timeout_s + MARGIN_S)

    def _start(self, words: str, **fields: object) -> Command:
        started = Command(next(self._numbers), words, self)
        self._commands[started.number] = started
        if self.gone.is_set():
            raise GuestError(f"{self.name}: the guest is gone")
        self.send(id=started.number, **fields)
        return started

    def run(self, command: str | Sequence[str], timeout_s: float = 60.0, stdin: bytes = b"") -> Done:
        """Run a command to its end; the exit code is the caller's to judge."""
        return self.start(command, timeout_s, stdin).wait(timeout_s + MARGIN_S)

    def must(self, command: str | Sequence[str], timeout_s: float = 60.0, stdin: bytes = b"") -> str:
        """Run a command and return its output. GuestError unless it exits with 0."""
        done = self.run(command, timeout_s, stdin)
        if done.code:
            words = command if isinstance(command, str) else shlex.join(command)
            raise GuestError(f"{self.name}: {words!r}: exit {done.code}\n{done.out}{done.err}")
        return done.out

    def _read(self) -> None:
        buffer = b""
        with suppress(OSError):
            while data := self._socket.recv(65536):
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    self._take(json.loads(line))
        self.gone.set()
        for command in list(self._commands.values()):
            command.ended.set()

    def _take(self, message: dict) -> None:
        if "ready" in message:
            self.ready.set()
            return
        command = self._commands[message["id"]]
        if "code" in message:
            command.code = message["code"]
            command.ended.set()
        else:
            (command.out if message["fd"] == 1 else command.err).extend(base64.b64decode(message["data"]))

    def close(self) -> None:
        """Hang up."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._reader.join(10)
