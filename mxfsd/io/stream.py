"""A connection that carries frames over a non-blocking stream socket, with the event loop's reader and writer calls.

The base of the TLS connections between daemons (`mxfsd.io.peers`) and of daemon.sock (`mxfsd.io.unixconn`). It uses
the socket itself rather than an asyncio transport: asyncio's TLS transport takes longer for a small frame, and no
transport hands out descriptors that come with the data.
"""

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import structlog

from mxfs_proto.errors import IoFailure, MisuseError, MxfsError, PeerError
from mxfs_proto.frames import Buffer, Frame, FrameDecoder, FrameType, encode_header, payload_length

log = structlog.get_logger(__name__)

READ_BYTES: Final = 64 * 1024
TURN_BYTES: Final = 1024 * 1024
"""Bytes read before other work of the event loop gets its turn."""
JOIN_BYTES: Final = 32 * 1024
"""Up to this size header and payload are joined for one write; beyond, they are written one after the other."""
MAX_BACKLOG: Final = 64 * 1024 * 1024
LINGER_S: Final = 1.0
ACCEPT_PAUSE_S: Final = 0.5


class FrameConnection:
    """Frames over a connected socket.

    `start` gives the callbacks and begins to read. *on_frame(connection, frame)* is called for each frame in order;
    *on_lost(connection, error)* once, when the connection ended by itself (error None: the peer closed it cleanly
    between two frames), and never after `close` or `abort`.
    """

    def __init__(self, sock: socket.socket, peer_name: str) -> None:
        self.peer_name = peer_name
        self._sock = sock
        self._fd = sock.fileno()
        self._loop = asyncio.get_running_loop()
        self._decoder = FrameDecoder()
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._on_frame: Callable[[Any, Frame], None] | None = None
        self._on_lost: Callable[[Any, MxfsError | None], None] | None = None
        self._inbox: deque[Frame] = deque()
        self._backlog: deque[tuple[memoryview, tuple[int, ...]]] = deque()  # with descriptors of our own
        self._backlog_bytes = 0
        self._writing = False
        self._reading = False
        self._paused = False
        self._closing = False  # `close` was called: what is queued still goes out
        self._closed = False
        self._linger: asyncio.TimerHandle | None = None
        self._drained: asyncio.Future[None] | None = None
        self.sent_bytes = 0
        self.received_bytes = 0

    def start(self, on_frame: Callable[[Any, Frame], None], on_lost: Callable[[Any, MxfsError | None], None]) -> None:
        """Begin to read. Raises MisuseError when called twice or on a closed connection."""
        if self._on_frame is not None or self._closing:
            raise MisuseError(f"the connection to {self.peer_name} was started or closed before")
        self._on_frame, self._on_lost = on_frame, on_lost
        self._read_more()
        # What came together with the end of a handshake may be in the TLS layer, where epoll does not see it.
        self._loop.call_soon(self._on_readable)

    @property
    def closed(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._closing or self._closed

    @property
    def backlog_bytes(self) -> int:
        """Bytes that wait because the peer does not read fast enough."""
        return self._backlog_bytes

    # -- what the kinds of socket do differently ------------------------------------------------------------------

    def _recv_into(self, room: memoryview) -> int | None:
        """Receive; return 0 at the end of the stream and None when there is nothing now. Raises OSError."""
        try:
            return self._sock.recv_into(room)
        except (BlockingIOError, InterruptedError):
            return None

    def _send_some(self, data: Buffer, fds: tuple[int, ...]) -> int:
        """Send a part of *data*, return how many bytes; 0 when there is no room. Raises OSError.

        Descriptors go with the first byte.
        """
        if fds:
            raise MisuseError(f"no descriptor can be sent to {self.peer_name}")
        try:
            return self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0

    def _buffered(self) -> bool:
        """Whether there is data to read that epoll(7) does not know of."""
        return False

    def _recv_unwanted(self, room: memoryview) -> int | None:
        """As _recv_into, after `close`: the bytes are thrown away. Raises OSError."""
        return self._recv_into(room)

    def _last_words(self, err: PeerError) -> None:
        """Tell the peer what it did wrong, and `close`, where the protocol has a frame for that."""

    def _shut_write(self) -> None:
        """Tell the peer that nothing more comes. Raises OSError."""
        self._sock.shutdown(socket.SHUT_WR)

    # -- sending --------------------------------------------------------------------------------------------------

    def send(
        self,
        kind: FrameType,
        payload: Buffer | Sequence[Buffer] = b"",
        epoch: int = 0,
        session: int = 0,
        seq: int = 0,
    ) -> None:
        """Send a frame, whose payload may be given in parts; never blocks.

        The parts must not change until they are sent, unless the payload is at most JOIN_BYTES. On a connection
        that is gone the frame is dropped: `on_lost` tells, or has told. Raises MisuseError.
        """
        parts: Sequence[Buffer] = (payload,) if isinstance(payload, bytes | bytearray | memoryview) else payload
        length = payload_length(parts)
        header = encode_header(kind, length, epoch, session, seq)
        if length <= JOIN_BYTES:
            self._write((b"".join((header, *parts)),))
        else:
            self._write((header, *parts))

    def _write(self, chunks: Sequence[Buffer], fds: tuple[int, ...] = ()) -> None:
        if self._closing or self._closed:
            return
        for chunk in chunks:
            done = 0
            if not self._backlog:
                try:
                    done = self._send_all(chunk, fds)
                except OSError as err:
                    self._lose_soon(self._failure(err))
                    return
            if done < len(chunk):
                self._queue(memoryview(chunk)[done:], () if done else fds)
            fds = ()
        if self._backlog_bytes > MAX_BACKLOG:
            self._lose_soon(PeerError(f"{self.peer_name} has not read {self._backlog_bytes} bytes that wait for it"))

    def _send_all(self, chunk: Buffer, fds: tuple[int, ...]) -> int:
        """Send as much of *chunk* as goes now; return how much."""
        length = len(chunk)
        done = self._send_some(chunk, fds)
        if 0 < done < length:
            view = memoryview(chunk)
            while done < length and (count := self._send_some(view[done:], ())):
                done += count
        self.sent_bytes += done
        return done

    def _queue(self, chunk: memoryview, fds: tuple[int, ...]) -> None:
        self._backlog.append((chunk, tuple(os.dup(fd) for fd in fds)))
        self._backlog_bytes += len(chunk)
        if not self._writing:
            self._writing = True
            self._loop.add_writer(self._fd, self._on_writable)

    def _on_writable(self) -> None:
        try:
            while self._backlog:
                chunk, fds = self._backlog[0]
                done = self._send_all(chunk, fds)
                self._backlog_bytes -= done
                if done:
                    _close_all(fds)
                    self._backlog[0] = (chunk[done:], ())
                if done < len(chunk):
                    break
                self._backlog.popleft()
        except OSError as err:
            self._lose_soon(self._failure(err))
            return
        if not self._backlog:
            self._writing = False
            self._loop.remove_writer(self._fd)
            if self._closing:
                self._finish_sending()
        if self._drained is not None and self._backlog_bytes < JOIN_BYTES:
            self._wake_drain()

    async def drain(self) -> None:
        """Wait until (almost) nothing waits in the backlog, or the connection is gone."""
        if self._backlog_bytes >= JOIN_BYTES and not self._closed:
            if self._drained is None:
                self._drained = self._loop.create_future()
            await asyncio.shield(self._drained)

    def _wake_drain(self) -> None:
        waiting, self._drained = self._drained, None
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    # -- receiving ------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop to read, so that the peer cannot send faster than we work. Frames at hand may still be delivered."""
        if not self._paused:
            self._paused = True
            if self._reading:
                self._reading = False
                self._loop.remove_reader(self._fd)

    def resume(self) -> None:
        """Read again after `pause`."""
        if self._paused:
            self._paused = False
            if self._on_frame is not None and not self._closed:
                self._read_more()
                self._loop.call_soon(self._on_readable)

    def _read_more(self) -> None:
        if not self._reading and not self._paused:
            self._reading = True
            self._loop.add_reader(self._fd, self._on_readable)

    def _on_readable(self) -> None:
        if self._closed or self._paused:
            return
        if self._closing:
            self._discard()
            return
        try:
            self._read()
        except OSError as err:
            self._lose(self._failure(err))
        except PeerError as err:
            self._lose(err)
        finally:
            # A callback that raised has left frames behind: they are delivered before anything newer is read.
            if self._inbox and not self._closing:
                self._loop.call_soon(self._on_readable)

    def _read(self) -> None:
        decoder, inbox, turn = self._decoder, self._inbox, 0
        if inbox:
            self._deliver()
        while turn < TURN_BYTES and not self._closing and not self._closed and not self._paused:
            tail = decoder.tail()
            room = self._buffer if tail is None else tail
            count = self._recv_into(room)
            if count is None:
                return
            if count == 0:
                whole = decoder.idle
                self._lose(None if whole else PeerError(f"{self.peer_name} closed the connection within a frame"))
                return
            turn += count
            self.received_bytes += count
            if tail is None:
                inbox.extend(decoder.feed(self._buffer[:count]))
            elif (frame := decoder.filled(count)) is not None:
                inbox.append(frame)
            self._deliver()
            if count < len(room) and decoder.tail() is None and not self._buffered():
                return  # the socket is empty, as far as we know: epoll tells if not
        if self._buffered():
            self._loop.call_soon(self._on_readable)

    def _deliver(self) -> None:
        inbox, on_frame = self._inbox, self._on_frame
        assert on_frame is not None
        while inbox and not self._closing and not self._closed:
            on_frame(self, inbox.popleft())

    # -- the end --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Send what is queued, for a second at most, then close; no callback comes any more. Can be repeated."""
        if self._closing or self._closed:
            return
        self._closing = True
        self._on_frame = self._on_lost = None
        self._inbox.clear()
        self._linger = self._loop.call_later(LINGER_S, self.abort)
        if not self._backlog:
            self._finish_sending()

    def _finish_sending(self) -> None:
        """Everything is sent: say so, and wait for the peer's end; closing now could make it lose our last frames.

        tcp(7) answers data that nobody has read with a reset, which discards what the peer has not read yet.
        """
        try:
            self._shut_write()
        except OSError:
            self.abort()
            return
        self._paused = False
        self._read_more()
        self._loop.call_soon(self._on_readable)

    def _discard(self) -> None:
        try:
            while (count := self._recv_unwanted(self._buffer)) is not None:
                if count == 0:
                    self.abort()
                    return
        except (OSError, PeerError):
            self.abort()

    def abort(self) -> None:
        """Close at once; no callback comes any more. Can be repeated."""
        if self._closed:
            return
        self._closed = self._closing = True
        self._on_frame = self._on_lost = None
        if self._reading:
            self._loop.remove_reader(self._fd)
        if self._writing:
            self._loop.remove_writer(self._fd)
        self._reading = self._writing = False
        if self._linger is not None:
            self._linger.cancel()
        self._inbox.clear()
        for _, fds in self._backlog:
            _close_all(fds)
        self._backlog.clear()
        self._backlog_bytes = 0
        self._wake_drain()
        self._sock.close()

    def _failure(self, err: OSError) -> MxfsError:
        return IoFailure(f"connection to {self.peer_name}: {err}", err.errno)

    def _lose_soon(self, err: MxfsError) -> None:
        """End the connection; the owner hears of it later, not from inside its own call of `send`."""
        self._loop.call_soon(self._read_last, err)

    def _read_last(self, err: MxfsError) -> None:
        """Deliver what the peer has still sent (it may say why it went), then give up."""
        self._on_readable()
        self._lose(err)

    def _lose(self, err: MxfsError | None) -> None:
        if self._closed:
            return
        on_lost = self._on_lost
        lingers = False
        if isinstance(err, PeerError) and not self._closing:
            self._last_words(err)
            lingers = self._closing
        if not lingers:
            self.abort()
        if on_lost is not None:
            log.info("connection_lost", peer=self.peer_name, reason=str(err) if err else "closed by the peer")
            on_lost(self, err)


def _close_all(fds: tuple[int, ...]) -> None:
    for fd in fds:
        os.close(fd)


class Acceptor:
    """Takes connections from a listening socket; *on_socket* gets each, non-blocking."""

    def __init__(self, sock: socket.socket, on_socket: Callable[[socket.socket], None]) -> None:
        self._sock = sock
        self._on_socket = on_socket
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._on_readable)

    def _on_readable(self) -> None:
        try:
            accepted, _ = self._sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as err:
            # No descriptors or no memory left: the connection stays in the queue, so the loop would spin.
            log.error("accept_failed", reason=str(err))
            self._loop.remove_reader(self._sock.fileno())
            self._pause = self._loop.call_later(ACCEPT_PAUSE_S, self._resume)
            return
        accepted.setblocking(False)
        self._on_socket(accepted)

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._sock.fileno(), self._on_readable)

    def close(self) -> None:
        """Stop to listen. Can be repeated."""
        if self._sock.fileno() < 0:
            return
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
