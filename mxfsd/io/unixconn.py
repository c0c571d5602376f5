"""Frames over a Unix stream socket: daemon.sock, between the FUSE layer and the daemon of one node.

Both ends must run as uid 0 (SO_PEERCRED, unix(7)). A frame may carry descriptors (SCM_RIGHTS): they are there when
the frame is delivered, in the order in which they were sent.
"""

import array
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import structlog

from mxfs_proto.errors import IoFailure, MisuseError, MxfsError, PeerError
from mxfs_proto.frames import Buffer, Frame, FrameType, encode_header, payload_length
from mxfsd.io.stream import JOIN_BYTES, Acceptor, FrameConnection

log = structlog.get_logger(__name__)

MAX_FDS: Final = 16
"""Descriptors that one frame may carry."""
MAX_UNCLAIMED_FDS: Final = 64
SOCKET_BYTES: Final = 1024 * 1024
_ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
_UCRED = struct.Struct("=iII")  # struct ucred: pid, uid, gid


class UnixFrameConnection(FrameConnection):
    """A FrameConnection that can pass descriptors. The receiver of a frame asks for them with `take_fds`."""

    def __init__(self, sock: socket.socket, peer_name: str) -> None:
        super().__init__(sock, peer_name)
        self._fds: deque[int] = deque()

    def send(
        self,
        kind: FrameType,
        payload: Buffer | Sequence[Buffer] = b"",
        epoch: int = 0,
        session: int = 0,
        seq: int = 0,
        fds: Sequence[int] = (),
    ) -> None:
        """As FrameConnection.send; *fds* stay the caller's, who may close them at once. Raises MisuseError."""
        if not fds:
            super().send(kind, payload, epoch, session, seq)
            return
        if len(fds) > MAX_FDS:
            raise MisuseError(f"{len(fds)} descriptors, {MAX_FDS} fit a frame")
        parts: Sequence[Buffer] = (payload,) if isinstance(payload, bytes | bytearray | memoryview) else payload
        length = payload_length(parts)
        header = encode_header(kind, length, epoch, session, seq)
        chunks = (b"".join((header, *parts)),) if length <= JOIN_BYTES else (header, *parts)
        self._write(chunks, tuple(fds))

    def take_fds(self, count: int) -> list[int]:
        """Return the next *count* descriptors, now the caller's to close. Raises PeerError when there are fewer."""
        if count > len(self._fds):
            raise PeerError(f"{self.peer_name} sent {len(self._fds)} descriptors, {count} are needed")
        return [self._fds.popleft() for _ in range(count)]

    def _send_some(self, data: Buffer, fds: tuple[int, ...]) -> int:
        try:
            if not fds:
                return self._sock.send(data)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
            return self._sock.sendmsg((data,), (rights,))
        except (BlockingIOError, InterruptedError):
            return 0

    def _recv_into(self, room: memoryview) -> int | None:
        try:
            count, ancillary, flags, _ = self._sock.recvmsg_into((room,), _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return None
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self._fds.extend(fds)
        if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_UNCLAIMED_FDS:
            raise PeerError(f"{self.peer_name} sent too many descriptors")
        return count

    def abort(self) -> None:
        """Close at once; descriptors that nobody took are closed too."""
        super().abort()
        while self._fds:
            os.close(self._fds.popleft())


def _peer_of(sock: socket.socket) -> tuple[int, int]:
    """Return (pid, uid) of the process at the other end."""
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid


def _enlarge(sock: socket.socket) -> None:
    """Let a whole large payload go in few system calls. The kernel caps what it gives."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)


class UnixFrameServer:
    """Listens on a path. *on_connection* gets each connection of a root process and must `start` it."""

    def __init__(self, path: str, on_connection: Callable[[UnixFrameConnection], None]) -> None:
        self._path = path
        self._on_connection = on_connection
        self._acceptor: Acceptor | None = None
        self.refused = 0

    def start(self) -> None:
        """Make the socket, mode 0600, in place of one that an earlier process left. Raises IoFailure."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            try:
                os.unlink(self._path)
            except FileNotFoundError:
                pass
            # Nobody can connect before listen(2), so the mode is right before it matters.
            sock.bind(self._path)
            os.chmod(self._path, 0o600)
            sock.listen(16)
        except OSError as err:
            sock.close()
            raise IoFailure(f"{self._path}: {err}", err.errno) from err
        self._acceptor = Acceptor(sock, self._accepted)

    def _accepted(self, sock: socket.socket) -> None:
        try:
            pid, uid = _peer_of(sock)
            _enlarge(sock)
        except OSError as err:
            log.warning("daemon_sock_refused", reason=str(err))
            sock.close()
            return
        if uid != 0:
            self.refused += 1
            log.warning("daemon_sock_refused", pid=pid, uid=uid)
            sock.close()
            return
        self._on_connection(UnixFrameConnection(sock, f"pid {pid}"))

    def close(self) -> None:
        """Stop to listen and remove the path; connections stay. Can be repeated."""
        if self._acceptor is not None:
            self._acceptor.close()
            self._acceptor = None
            try:
                os.unlink(self._path)
            except FileNotFoundError:
                pass


def connect_unix(
    path: str,
    on_frame: Callable[[Any, Frame], None],
    on_lost: Callable[[Any, MxfsError | None], None],
) -> UnixFrameConnection:
    """Connect to the server at *path*. Raises IoFailure, and PeerError when it is not root's."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # Connecting blocks only while the backlog of listen(2) is full.
        sock.settimeout(5)
        sock.connect(path)
        sock.setblocking(False)
        pid, uid = _peer_of(sock)
        _enlarge(sock)
    except OSError as err:
        sock.close()
        raise IoFailure(f"{path}: {err}", err.errno) from err
    if uid != 0:
        sock.close()
        raise PeerError(f"{path} belongs to a process of uid {uid}")
    connection = UnixFrameConnection(sock, f"pid {pid}")
    connection.start(on_frame, on_lost)
    return connection
