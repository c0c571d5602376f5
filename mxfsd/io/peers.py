"""TLS connections between the daemons of a volume: TLS 1.3 only, both sides verified, one frame stream each.

The identity in the certificate (`mxfsd.io.certs`) decides who the peer is; the owner says whom it expects. The
handshake uses the loop's own reader and writer calls, like everything in `mxfsd.io.stream`.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import Any, Final

import structlog

from mxfs_proto.errors import IoFailure, MxfsError, PeerError
from mxfs_proto.frames import Buffer, Frame, FrameType, pack_json
from mxfsd.io.identity import PeerIdentity, identity_of
from mxfsd.io.stream import Acceptor, FrameConnection

log = structlog.get_logger(__name__)

_SYN_S: Final = 0.4
HANDSHAKE_S: Final = 5.0
MAX_HANDSHAKES: Final = 128
"""Connections that may be in their handshake at once; more are closed."""
KEEPALIVE_IDLE_S: Final = 5
KEEPALIVE_INTERVAL_S: Final = 2
KEEPALIVE_COUNT: Final = 3
SOCKET_BYTES: Final = 1024 * 1024


class PeerConnection(FrameConnection):
    """A FrameConnection to another node, who has proved its *identity*."""

    def __init__(self, sock: ssl.SSLSocket, identity: PeerIdentity, address: str) -> None:
        super().__init__(sock, f"node {identity.slot} at {address}")
        self.identity = identity
        self._tls = sock

    def _recv_into(self, room: memoryview) -> int | None:
        try:
            return self._tls.recv_into(room)
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLWantWriteError:
            # An answer of the TLS layer does not fit the socket; it goes out before our next record does.
            return None
        except ssl.SSLZeroReturnError:
            return 0

    def _send_some(self, data: Buffer, fds: tuple[int, ...]) -> int:
        # After a refusal OpenSSL wants the same bytes again: they are the first of the backlog, so they come first.
        try:
            return self._tls.send(data)
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return 0

    def _buffered(self) -> bool:
        return self._tls.pending() > 0

    def _failure(self, err: OSError) -> MxfsError:
        if isinstance(err, ssl.SSLError) and not isinstance(err, ssl.SSLEOFError):
            return PeerError(_tls_reason(self.peer_name, err))
        return super()._failure(err)

    def _last_words(self, err: PeerError) -> None:
        self.refuse(str(err))

    def refuse(self, reason: str, *, retry: bool = False) -> None:
        """Say why this ends, and close. With *retry* the peer may try again later, or elsewhere."""
        self.send(FrameType.REFUSE, pack_json({"reason": reason, "retry": retry}))
        self.close()

    def _shut_write(self) -> None:
        try:
            self._tls.unwrap()
        except ssl.SSLError:
            # The close_notify alert is sent; what fails is to wait for the peer's, behind data that we do not want.
            pass
        super()._shut_write()

    def _recv_unwanted(self, room: memoryview) -> int | None:
        try:
            return socket.socket.recv_into(self._tls, room)  # as it is, past the TLS layer
        except (BlockingIOError, InterruptedError):
            return None


def _prepare(sock: socket.socket) -> None:
    """Set the options of a TCP connection: no delays, and a dead peer found within some ten seconds (tcp(7))."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)
    dead_ms = 1000 * (KEEPALIVE_IDLE_S + KEEPALIVE_INTERVAL_S * KEEPALIVE_COUNT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, dead_ms)


async def _ready(sock: socket.socket, *, write: bool) -> None:
    """Wait until the socket can be read (or written)."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not future.done():
            future.set_result(None)

    add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
    fd = sock.fileno()
    add(fd, wake)
    try:
        await future
    finally:
        remove(fd)


def _tls_reason(who: str, err: ssl.SSLError) -> str:
    """Say in one line what a failed verification means: each end has its own, and an alert tells of the other's."""
    if isinstance(err, ssl.SSLCertVerificationError):
        return f"{who} has another cluster key, or is not of this volume ({err.verify_message})"
    reason = err.reason or str(err)
    if "_ALERT_" in reason and reason.endswith(("UNKNOWN_CA", "CERTIFICATE", "CERTIFICATE_REQUIRED", "DECRYPT_ERROR")):
        return f"{who} does not accept our certificate: it has another cluster key, or is not of this volume ({reason})"
    return f"{who} is no node of this volume ({reason})"


async def _handshake(sock: socket.socket, context: ssl.SSLContext, *, server: bool) -> ssl.SSLSocket:
    """Return the TLS socket; *sock* is closed when it fails. Raises OSError (ssl.SSLError is one)."""
    try:
        tls = context.wrap_socket(sock, server_side=server, do_handshake_on_connect=False, suppress_ragged_eofs=False)
    except BaseException:
        sock.close()
        raise
    try:
        while True:
            try:
                tls.do_handshake()
                return tls
            except ssl.SSLWantReadError:
                await _ready(tls, write=False)
            except ssl.SSLWantWriteError:
                await _ready(tls, write=True)
    except BaseException:
        tls.close()
        raise


async def connect_peer(
    address: str,
    port: int,
    context: ssl.SSLContext,
    on_frame: Callable[[Any, Frame], None],
    on_lost: Callable[[Any, MxfsError | None], None],
    *,
    check: Callable[[PeerIdentity], str | None] | None = None,
    local_address: str | None = None,
    timeout_s: float = HANDSHAKE_S,
) -> PeerConnection:
    """Connect to a daemon and start to read.

    *check* returns why a peer of that identity is not the expected one, or None; it may raise too. Raises IoFailure
    (not reached in time), PeerError (not a node of this volume, or not the expected one). The peer may still refuse
    us: it sends a REFUSE, or with TLS 1.3 that shows as a lost connection after this has returned.
    """
    where = f"{address} port {port}"
    try:
        async with asyncio.timeout(timeout_s):
            tls = await _handshake(await _tcp_connect(address, port, local_address), context, server=False)
    except TimeoutError:
        raise IoFailure(f"{where}: no answer within {timeout_s:g} s") from None
    except ssl.SSLEOFError as err:
        raise IoFailure(f"{where} closed the connection in its handshake") from err
    except ssl.SSLError as err:
        raise PeerError(_tls_reason(where, err)) from err
    except OSError as err:
        raise IoFailure(f"{where}: {err}", err.errno) from err
    try:
        identity = _identify(tls, check)
    except MxfsError as err:
        log.warning("peer_refused", address=address, port=port, reason=str(err))
        tls.close()
        raise
    connection = PeerConnection(tls, identity, where)
    connection.start(on_frame, on_lost)
    return connection


async def _tcp_connect(address: str, port: int, local_address: str | None) -> socket.socket:
    """Connect to a numeric address (link-local ones with %interface), however long it takes. Raises OSError.

    The kernel repeats a lost SYN after 1, 2, 4 s ...: a network that works again would not be noticed for as long.
    """
    while True:
        try:
            async with asyncio.timeout(_SYN_S):
                return await _tcp_connect_once(address, port, local_address)
        except TimeoutError:
            continue


async def _tcp_connect_once(address: str, port: int, local_address: str | None) -> socket.socket:
    info = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)[0]
    sock = socket.socket(info[0], socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        _prepare(sock)
        if local_address is not None:
            sock.bind((local_address, 0))
        await asyncio.get_running_loop().sock_connect(sock, info[4])
    except BaseException:
        sock.close()
        raise
    return sock


def _identify(tls: ssl.SSLSocket, check: Callable[[PeerIdentity], str | None] | None) -> PeerIdentity:
    identity = identity_of(tls)
    reason = check(identity) if check is not None else None
    if reason is not None:
        raise PeerError(f"{identity.uri}: {reason}")
    return identity


class PeerServer:
    """Accepts connections of other nodes.

    *check* returns why a peer is refused, or None; *on_connection* gets those that passed and must `start` them.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        check: Callable[[PeerIdentity], str | None],
        on_connection: Callable[[PeerConnection], None],
        *,
        timeout_s: float = HANDSHAKE_S,
    ) -> None:
        self._context = context
        self._check = check
        self._on_connection = on_connection
        self._timeout_s = timeout_s
        self._acceptors: list[Acceptor] = []
        self._handshakes: set[asyncio.Task[None]] = set()
        self.refused = 0

    def start(self, addresses: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
        """Listen on numeric *addresses*; return them with port 0 replaced by the actual one. Raises IoFailure."""
        bound = []
        for address, port in addresses:
            try:
                sock, actual = _listen(address, port)
            except OSError as err:
                self.close()
                raise IoFailure(f"cannot listen on {address} port {port}: {err}", err.errno) from err
            self._acceptors.append(Acceptor(sock, self._accepted))
            bound.append((address, actual))
        return bound

    def _accepted(self, sock: socket.socket) -> None:
        if len(self._handshakes) >= MAX_HANDSHAKES:
            self._refuse("?", "too many connections in their handshake")
            sock.close()
            return
        task = asyncio.get_running_loop().create_task(self._admit(sock))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    async def _admit(self, sock: socket.socket) -> None:
        address = "?"
        try:
            host, port = sock.getpeername()[:2]
            address = f"{host} port {port}"
            _prepare(sock)
            async with asyncio.timeout(self._timeout_s):
                tls = await _handshake(sock, self._context, server=True)
        except ssl.SSLEOFError:
            self._refuse(address, "closed in its handshake")
            sock.close()
            return
        except ssl.SSLError as err:
            self._refuse(address, _tls_reason("the peer", err))
            sock.close()
            return
        except OSError as err:  # TimeoutError is one
            self._refuse(address, str(err) or "no handshake in time")
            sock.close()
            return
        try:
            identity = identity_of(tls)
        except PeerError as err:
            self._refuse(address, str(err))
            tls.close()
            return
        connection = PeerConnection(tls, identity, address)
        reason = self._check(identity)
        if reason is None:
            self._on_connection(connection)
            return
        self._refuse(address, f"{identity.uri}: {reason}")
        connection.refuse(reason)

    def _refuse(self, address: str, reason: str) -> None:
        self.refused += 1
        log.warning("peer_refused", address=address, reason=reason)

    def close(self) -> None:
        """Stop to listen and end handshakes; connections stay. Can be repeated."""
        for acceptor in self._acceptors:
            acceptor.close()
        self._acceptors.clear()
        for task in self._handshakes:
            task.cancel()


def _listen(address: str, port: int) -> tuple[socket.socket, int]:
    info = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_PASSIVE)[
        0
    ]
    sock = socket.socket(info[0], socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if info[0] == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(info[4])
        sock.listen(64)
        return sock, int(sock.getsockname()[1])
    except BaseException:
        sock.close()
        raise
