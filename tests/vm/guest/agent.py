"""Runs in a guest: executes the commands that come over a virtio-serial port, any number at once.

A line each way is a JSON object. In: ``{"id": N, "argv": [...], "stdin": BASE64, "timeout": S}``, or ``{"id": N,
"signal": S}`` for the process group of an earlier command, or ``{"id": N, "ask": CMD}`` for what the daemons here
answer to a request at their control sockets, a line each: a look for which no Python has to start. Out: ``{"id": N,
"fd": 1|2, "data": BASE64}`` as output comes, then ``{"id": N, "code": C}``, where C is the exit code, or minus the
signal. ``{"ready": true}`` comes first.
"""

import base64
import json
import os
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import BinaryIO

PORT_NAME = "mxfs.agent"
CHUNK = 65536
CONTROL = "*/control.sock"
ASK_S = 10.0


def port() -> str:
    """Return the device of our port (there is no udev to name it)."""
    for entry in Path("/sys/class/virtio-ports").iterdir():
        if (entry / "name").read_text().strip() == PORT_NAME:
            return f"/dev/{entry.name}"
    raise SystemExit(f"no virtio port {PORT_NAME}")


class Agent:
    """The port, and the commands that run."""

    def __init__(self, device: str) -> None:
        self._port = os.open(device, os.O_RDWR)  # it can be opened once only
        self._lock = threading.Lock()
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    def say(self, **fields: object) -> None:
        """Send one line."""
        line = json.dumps(fields).encode() + b"\n"
        with self._lock:
            while line:
                line = line[os.write(self._port, line) :]

    def serve(self) -> None:
        """Answer requests for ever."""
        self.say(ready=True)
        buffer = b""
        while True:
            data = os.read(self._port, CHUNK)
            if not data:
                # Nobody is connected at the other end: this port gives end of file at once then.
                threading.Event().wait(0.2)
                continue
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                self._request(json.loads(line))

    def _request(self, request: dict) -> None:
        number = request["id"]
        if "signal" in request:
            running = self._running.get(number)
            if running is not None:
                self._signal(running, request["signal"])
            return
        act = self._ask if "ask" in request else self._run
        threading.Thread(target=act, args=(number, request), daemon=True).start()

    def _ask(self, number: int, request: dict) -> None:
        code = 1
        for path in Path("/run/mxfs").glob(CONTROL):
            try:
                with socket.socket(socket.AF_UNIX) as control:
                    control.settimeout(ASK_S)
                    control.connect(str(path))
                    control.sendall(json.dumps({"cmd": request["ask"]}).encode() + b"\n")
                    answer = control.makefile("rb").readline()
            except OSError as error:
                self.say(id=number, fd=2, data=base64.b64encode(f"{path}: {error}\n".encode()).decode())
                continue
            self.say(id=number, fd=1, data=base64.b64encode(answer).decode())
            code = 0
        self.say(id=number, code=code)

    def _run(self, number: int, request: dict) -> None:
        try:
            process = subprocess.Popen(
                request["argv"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            self.say(id=number, fd=2, data=base64.b64encode(str(error).encode()).decode())
            self.say(id=number, code=127)
            return
        self._running[number] = process
        timer = threading.Timer(request["timeout"], self._signal, (process, signal.SIGKILL))
        timer.start()
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        readers = [
            threading.Thread(target=self._copy, args=(number, fd, stream), daemon=True)
            for fd, stream in ((1, process.stdout), (2, process.stderr))
        ]
        for reader in readers:
            reader.start()
        try:
            process.stdin.write(base64.b64decode(request.get("stdin", "")))
            process.stdin.close()
        except BrokenPipeError:
            pass  # it did not want to know
        code = process.wait()
        timer.cancel()
        # A daemon that it left behind may hold its output open for ever.
        for reader in readers:
            reader.join(1.0)
        del self._running[number]
        self.say(id=number, code=code)

    def _copy(self, number: int, fd: int, stream: BinaryIO) -> None:
        while data := os.read(stream.fileno(), CHUNK):
            self.say(id=number, fd=fd, data=base64.b64encode(data).decode())

    @staticmethod
    def _signal(process: "subprocess.Popen[bytes]", signum: int) -> None:
        try:
            os.killpg(process.pid, signum)
        except ProcessLookupError:
            pass  # it has ended by itself


if __name__ == "__main__":
    Agent(port()).serve()
