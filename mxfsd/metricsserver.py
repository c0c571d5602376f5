"""Serves ``GET /metrics`` over HTTP where the mount option metrics= says so.

On the daemon's own loop, of which a scraper takes what it takes to copy the counters; the text is made in a thread of
its own. Whoever is slow, silent or one too many is cut off: nothing waits for a scraper.
"""

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import structlog

from mxfs_proto.errors import IoFailure, MxfsError
from mxfsd import rundir
from mxfsd.options import host_port
from mxfsd.report import full_report

if TYPE_CHECKING:
    from mxfsd.daemon import Daemon

log = structlog.get_logger(__name__)

REQUEST_S = 5.0
"""From a connection to the last byte of its answer."""
CONNECTIONS = 8
_LINE_MAX = 8192
_HEADERS_MAX = 100
_RETRY_S = 2.0


class MetricsServer:
    """One listening socket. *snapshot* is called in the loop for each answer and gives what ``exposition`` takes,
    or None while there is nothing to tell yet."""

    def __init__(
        self, host: str, port: int, snapshot: Callable[[], dict[str, Any] | None], *, request_s: float = REQUEST_S
    ) -> None:
        # Not at the top: it is loaded by those only who serve metrics.
        from mxfsd.metrics import CONTENT_TYPE, exposition

        self._exposition = exposition
        self._content_type = CONTENT_TYPE
        self._host = host
        self._port = port
        self._snapshot = snapshot
        self._request_s = request_s
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        # Not the loop's own threads: those may all hang in the disk, which is when somebody wants to see this.
        self._thread = ThreadPoolExecutor(1, "metrics")

    @property
    def port(self) -> int:
        """The port that it listens on."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    async def start(self) -> None:
        """Listen. Raises IoFailure."""
        try:
            family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
            self._server = await asyncio.start_server(
                self._connected, self._host, self._port, family=family, limit=_LINE_MAX
            )
        except OSError as exc:
            what = f"metrics={host_port(self._host, self._port)}"
            if exc.errno == errno.EADDRINUSE:
                reason = "another program, or another volume, has this port: each volume needs one of its own"
            elif exc.errno == errno.EADDRNOTAVAIL:
                reason = "this host has no such address"
            else:
                reason = os.strerror(exc.errno) if exc.errno and exc.errno > 0 else str(exc)
            raise IoFailure(f"{what}: {reason}", exc.errno) from None

    async def retry(self) -> None:
        """Listen as soon as that is possible."""
        while self._server is None:
            await asyncio.sleep(_RETRY_S)
            try:
                await self.start()
            except MxfsError:
                continue
            log.info("metrics are served again")

    async def close(self) -> None:
        """Stop listening; who is connected is cut off."""
        if self._server is not None:
            self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._tasks) >= CONNECTIONS:
            writer.transport.abort()
            return
        self._tasks.add(task)
        try:
            writer.transport.set_write_buffer_limits(0)  # drain() returns when the kernel has everything
            async with asyncio.timeout(self._request_s):
                writer.write(await self._answer(reader))
                await writer.drain()
            writer.close()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            writer.transport.abort()  # there is nobody to tell
        except Exception:  # noqa: BLE001 - logged with its traceback; a bug here must not keep the connection
            log.exception("metrics could not be told")
            writer.transport.abort()
        finally:
            self._tasks.discard(task)

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            request = (await reader.readuntil(b"\n")).split()
            for _ in range(_HEADERS_MAX):
                if (await reader.readuntil(b"\n")).strip() == b"":
                    break
            else:
                return _response("431 Request Header Fields Too Large")
        except asyncio.LimitOverrunError:
            return _response("431 Request Header Fields Too Large")
        if len(request) != 3 or not request[2].startswith(b"HTTP/1."):
            return _response("400 Bad Request")
        if request[0] not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", extra="Allow: GET, HEAD\r\n")
        if request[1].partition(b"?")[0] != b"/metrics":
            return _response("404 Not Found", b"the metrics are at /metrics\n")
        view = self._snapshot()
        if view is None:
            return _response("503 Service Unavailable", b"this node has not joined yet\n")
        body = await asyncio.get_running_loop().run_in_executor(self._thread, self._exposition, view)
        return _response("200 OK", body, self._content_type, head=request[0] == b"HEAD")


def _response(
    status: str, body: bytes = b"", kind: str = "text/plain; charset=utf-8", *, extra: str = "", head: bool = False
) -> bytes:
    lines = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{extra}\r\n"
    )
    return lines.encode() + (b"" if head else body)


async def begin(daemon: "Daemon") -> MetricsServer | None:
    """Serve the daemon's metrics where its options say so. Raises IoFailure before anything is mounted.

    Under a live mount nothing fails for want of metrics: they are served when the port is free again.
    """
    if daemon.options.metrics is None:
        return None

    def snapshot() -> dict[str, Any] | None:
        if daemon.held is None:
            return None
        return full_report(daemon)

    server = MetricsServer(*daemon.options.metrics, snapshot)
    try:
        await server.start()
    except IoFailure as exc:
        if rundir.recall(daemon.run_dir, rundir.FUSE) is None:
            await server.close()
            raise
        log.warning("no metrics yet", reason=str(exc))
        daemon.spawn(server.retry())
    return server
