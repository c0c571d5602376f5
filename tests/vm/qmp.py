"""QEMU's monitor protocol, as much of it as the tests need."""

import json
import socket
import time
from pathlib import Path

LIMIT_S = 30.0


class Qmp:
    """A connection to one QEMU's monitor."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(LIMIT_S)
        deadline = time.monotonic() + LIMIT_S
        while True:
            try:
                self._socket.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    self._socket.close()
                    raise
                time.sleep(0.05)
        self._file = self._socket.makefile("rb")
        self._file.readline()  # its greeting
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: object) -> object:
        """Execute a command and return its answer. RuntimeError when QEMU refuses."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            line = self._file.readline()
            if not line:
                raise RuntimeError(f"QEMU went away during {command}")
            answer = json.loads(line)
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
            # Anything else is an event.

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self._socket.close()
