"""The control socket: how ``mxfs`` and ``mount.mxfs`` talk to a running daemon.

A Unix stream socket ``control.sock`` in the volume's run directory, mode 0600, for uid 0 (or the daemon's own uid)
only. One request is one line of JSON, ``{"cmd": "status", ...arguments}``; its answer is one line of JSON,
``{"ok": true, ...}`` or ``{"ok": false, "error": "one line", "errno": n}``. A connection may carry several requests,
answered in order. The client half is synchronous and imports no asyncio: mount.mxfs must start quickly.
"""

import errno
import json
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxfs_proto.errors import IoFailure, MisuseError, MxfsError, PeerError

if TYPE_CHECKING:
    import asyncio

SOCKET_NAME = "control.sock"
REQUEST_MAX = 64 * 1024
REPLY_MAX = 256 * 1024 * 1024
DEFAULT_TIMEOUT_S = 10.0

_UCRED = struct.Struct("=iII")  # struct ucred of unix(7): pid, uid, gid

Reply = dict[str, Any]
Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class NotRunning(IoFailure):
    """No daemon listens on the socket: it is absent, or left over from one that died."""

    errno = errno.ENOTCONN


class RequestFailed(MxfsError):
    """The daemon answered ``ok: false``; the message is its ``error``."""


def request(path: str | Path, cmd: str, timeout_s: float = DEFAULT_TIMEOUT_S, **arguments: Any) -> Reply:
    """Send one request and return its reply (``ok`` is true in it).

    Raises NotRunning, RequestFailed (the daemon said no), IoFailure with ETIMEDOUT after *timeout_s* seconds in all,
    PeerError for an answer that is no JSON object.
    """
    line = json.dumps({"cmd": cmd, **arguments}).encode() + b"\n"
    deadline = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        try:
            # A path longer than sun_path (108 bytes) is reached through a descriptor of its folder.
            with _short_path(Path(path)) as short:
                sock.connect(short)
            sock.sendall(line)
            answer = _read_line(sock, deadline)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise NotRunning(f"{path}: no daemon is running ({error.strerror})") from None
        except TimeoutError:
            raise IoFailure(f"{path}: no answer to {cmd} within {timeout_s:g} s", errno.ETIMEDOUT) from None
        except OSError as error:
            raise IoFailure(f"{path}: {error.strerror}", error.errno) from error
    return _checked_reply(answer, path, cmd)


class _short_path:  # noqa: N801 - reads as a function
    """A context manager giving a path of at most 107 bytes that leads to the same socket."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def __enter__(self) -> str:
        if len(os.fsencode(self._path)) < 108:
            return str(self._path)
        self._fd = os.open(self._path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._fd}/{self._path.name}"

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def _read_line(sock: socket.socket, deadline: float) -> bytes:
    parts: list[bytes] = []
    size = 0
    while not (parts and parts[-1].endswith(b"\n")):
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        sock.settimeout(left_s)
        part = sock.recv(1 << 18)
        if not part:
            break
        parts.append(part)
        size += len(part)
        if size > REPLY_MAX:
            raise PeerError(f"control reply of more than {REPLY_MAX} bytes")
    return b"".join(parts)


def _checked_reply(answer: bytes, path: str | Path, cmd: str) -> Reply:
    if not answer.endswith(b"\n"):
        raise IoFailure(f"{path}: the daemon closed the connection before it answered {cmd}", errno.ECONNRESET)
    try:
        reply = json.loads(answer)
    except ValueError:
        raise PeerError(f"{path}: the answer to {cmd} is not JSON") from None
    if not isinstance(reply, dict) or not isinstance(reply.get("ok"), bool):
        raise PeerError(f"{path}: the answer to {cmd} is not a reply object")
    if not reply["ok"]:
        code = reply.get("errno")
        raise RequestFailed(str(reply.get("error", "failed")), code if isinstance(code, int) else None)
    return reply


def find_sockets(run_root: str | Path) -> list[Path]:
    """Return the control sockets under *run_root* (``*/control.sock``), sorted; whether one answers is not tried."""
    return sorted(path for path in Path(run_root).glob(f"*/{SOCKET_NAME}") if path.is_socket())


def answers(path: str | Path, timeout_s: float = 2.0) -> bool:
    """Return whether a daemon is behind that socket. One too busy to answer in time counts as running."""
    try:
        request(path, "ping", timeout_s)
    except NotRunning:
        return False
    except MxfsError:
        return True
    return True


class ControlServer:
    """The daemon's half: answers requests with the coroutine that *handlers* has for the command.

    A handler gets the whole request object and returns the reply's fields (``ok`` is added). What it raises of the
    MXFS error families becomes the ``error`` of the reply; anything else is logged with its traceback too.
    ``ping`` is always known.
    """

    def __init__(self, path: str | Path, handlers: Mapping[str, Handler]) -> None:
        self._path = Path(path)
        self._handlers = dict(handlers)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen. Raises MisuseError (EADDRINUSE) when another daemon answers there; a stale socket is replaced."""
        import asyncio

        if self._path.exists():
            if answers(self._path, 1.0):
                raise MisuseError(f"{self._path}: another daemon is running", errno.EADDRINUSE)
            self._path.unlink()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # The mode is right before the first connection can come: bind first, chmod, then listen.
            with _short_path(self._path) as short:
                sock.bind(short)
            self._path.chmod(0o600)
            self._server = await asyncio.start_unix_server(self._connected, sock=sock, limit=REQUEST_MAX)
        except BaseException:
            sock.close()
            raise

    async def close(self) -> None:
        """Stop listening, end the open connections, remove the socket."""
        import asyncio

        if self._server is None:
            return
        self._server.close()
        # The close request itself may run in one of these tasks: it must not wait for itself.
        ending = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        self._server = None
        with suppress(FileNotFoundError):
            self._path.unlink()

    async def _connected(self, reader: "asyncio.StreamReader", writer: "asyncio.StreamWriter") -> None:
        import asyncio

        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if _peer_uid(writer.get_extra_info("socket")) in (0, os.geteuid()):
                await self._serve(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass  # the client went away, or the daemon stops: there is nobody to tell
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: "asyncio.StreamReader", writer: "asyncio.StreamWriter") -> None:
        while True:
            try:
                line = await reader.readline()
            except ValueError:  # StreamReader.readline: the line is longer than the limit
                writer.write(_error_line(f"a request of more than {REQUEST_MAX} bytes", errno.EMSGSIZE))
                await writer.drain()
                return
            if not line.endswith(b"\n"):
                return
            writer.write(await self._answer(line))
            await writer.drain()

    async def _answer(self, line: bytes) -> bytes:
        try:
            fields = json.loads(line)
        except ValueError:
            return _error_line("the request is not JSON", errno.EPROTO)
        cmd = fields.get("cmd") if isinstance(fields, dict) else None
        if not isinstance(cmd, str):
            return _error_line("the request is not an object with a cmd", errno.EPROTO)
        handler = self._handlers.get(cmd)
        if handler is None:
            if cmd == "ping":
                return json.dumps({"ok": True, "pid": os.getpid()}).encode() + b"\n"
            known = ", ".join(sorted({*self._handlers, "ping"}))
            return _error_line(f"unknown command {cmd}; known are {known}", errno.EINVAL)
        try:
            reply = await handler(fields)
            return json.dumps({"ok": True, **reply}).encode() + b"\n"
        except (MxfsError, OSError) as error:
            return _error_line(str(error), error.errno or errno.EIO)
        except Exception as error:  # noqa: BLE001 - logged with its traceback
            # A bug in one handler must not end the connection without a word, nor the daemon.
            from mxfsd.log import get_logger

            get_logger("control").exception("control request failed", cmd=cmd)
            return _error_line(f"internal error: {type(error).__name__}: {error}", errno.EIO)


def _peer_uid(sock: Any) -> int:
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    uid: int = _UCRED.unpack(data)[1]
    return uid


def _error_line(message: str, code: int) -> bytes:
    return json.dumps({"ok": False, "error": message, "errno": code}).encode() + b"\n"
