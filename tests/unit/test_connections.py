"""Frame connections over real sockets: TLS between daemons and daemon.sock, with what peers may do wrong."""

import asyncio
import os
import random
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from mxfs_proto.errors import IoFailure, MisuseError, MxfsError, PeerError
from mxfs_proto.frames import MAX_PAYLOAD, Frame, FrameType, encode_header
from mxfsd.io import peers, stream
from mxfsd.io.certs import NodeContexts, VolumeKeys, make_contexts
from mxfsd.io.identity import PeerIdentity
from mxfsd.io.peers import PeerConnection, PeerServer, connect_peer
from mxfsd.io.stream import FrameConnection
from mxfsd.io.unixconn import MAX_UNCLAIMED_FDS, UnixFrameConnection, UnixFrameServer, connect_unix

VOLUME = UUID(int=0xABC)
KEYS = VolumeKeys.derive(bytes(32), VOLUME)


def node(slot: int, volume: UUID = VOLUME, key: bytes = bytes(32)) -> NodeContexts:
    return make_contexts(VolumeKeys.derive(key, volume), PeerIdentity(volume, UUID(int=slot), slot, 1))


class Log:
    """What one end of a connection has seen."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.lost: list[MxfsError | None] = []
        self.changed = asyncio.Event()
        self.hook: Callable[[Any, Frame], None] | None = None

    def on_frame(self, connection: Any, frame: Frame) -> None:
        self.frames.append(frame)
        self.changed.set()
        if self.hook is not None:
            self.hook(connection, frame)

    def on_lost(self, connection: FrameConnection, err: MxfsError | None) -> None:
        self.lost.append(err)
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await self.changed.wait()
                self.changed.clear()


class Pair:
    """Two connected ends, a the one that connected."""

    def __init__(self, kind: str, path: Path) -> None:
        self.kind, self.path = kind, path
        self.log_a, self.log_b = Log(), Log()
        self.a: Any = None
        self.b: Any = None
        self.server: Any = None
        self.arrived = asyncio.Event()

    def on_connection(self, connection: FrameConnection) -> None:
        self.b = connection
        connection.start(self.log_b.on_frame, self.log_b.on_lost)
        self.arrived.set()

    async def open(self) -> None:
        if self.kind == "tls":
            self.server = PeerServer(node(1).server, lambda identity: None, self.on_connection)
            [(_, port)] = self.server.start([("127.0.0.1", 0)])
            self.a = await connect_peer("127.0.0.1", port, node(2).client, self.log_a.on_frame, self.log_a.on_lost)
        else:
            self.server = UnixFrameServer(str(self.path / "daemon.sock"), self.on_connection)
            self.server.start()
            self.a = connect_unix(str(self.path / "daemon.sock"), self.log_a.on_frame, self.log_a.on_lost)
        async with asyncio.timeout(10):
            await self.arrived.wait()

    def close(self) -> None:
        for part in (self.a, self.b):
            if part is not None:
                part.abort()
        if self.server is not None:
            self.server.close()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="daemon.sock serves root only")


@pytest.fixture(params=["tls", pytest.param("unix", marks=needs_root)])
async def pair(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Pair]:
    made = Pair(request.param, tmp_path)
    try:
        await made.open()
        yield made
    finally:
        made.close()


@pytest.fixture
async def unix(tmp_path: Path) -> AsyncIterator[Pair]:
    if os.geteuid() != 0:
        pytest.skip("daemon.sock serves root only")
    made = Pair("unix", tmp_path)
    try:
        await made.open()
        yield made
    finally:
        made.close()


async def test_frames_of_all_sizes_in_both_directions(pair: Pair) -> None:
    rng = random.Random(7)
    sizes = [0, 1, 4095, 4096, 16384, 32768, 32769, 65504, 65536, 100_000, MAX_PAYLOAD] + [
        rng.randrange(200_000) for _ in range(40)
    ]
    payloads = [rng.randbytes(size) for size in sizes]
    for n, payload in enumerate(payloads):
        pair.a.send(FrameType.OP_REQ, payload, 5, 6, n)
        pair.b.send(FrameType.OP_REPLY, (payload[:100], memoryview(payload)[100:]), 5, 6, n)
    await pair.log_b.until(lambda: len(pair.log_b.frames) == len(sizes))
    await pair.log_a.until(lambda: len(pair.log_a.frames) == len(sizes))
    assert pair.log_b.frames == [Frame(FrameType.OP_REQ, 5, 6, n, p) for n, p in enumerate(payloads)]
    assert pair.log_a.frames == [Frame(FrameType.OP_REPLY, 5, 6, n, p) for n, p in enumerate(payloads)]
    assert pair.log_a.lost == pair.log_b.lost == []
    assert pair.a.backlog_bytes == pair.b.backlog_bytes == 0
    if pair.kind == "unix":
        assert pair.a.sent_bytes == pair.b.received_bytes == sum(sizes) + 32 * len(sizes)


async def test_drain_waits_for_a_slow_peer(pair: Pair) -> None:
    pair.b.pause()
    await asyncio.sleep(0)
    for n in range(8):
        pair.a.send(FrameType.OP_REQ, bytes(MAX_PAYLOAD), 0, 0, n)
    assert pair.a.backlog_bytes > MAX_PAYLOAD
    waiting = asyncio.ensure_future(pair.a.drain())
    await asyncio.sleep(0.05)
    assert not waiting.done() and pair.log_b.frames == []
    pair.b.resume()
    async with asyncio.timeout(20):
        await waiting
    await pair.log_b.until(lambda: len(pair.log_b.frames) == 8)
    assert [f.seq for f in pair.log_b.frames] == list(range(8))
    await pair.a.drain()  # nothing waits: returns


async def test_a_peer_that_never_reads_is_given_up(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_BACKLOG", 6 * 1024 * 1024)
    pair.b.pause()
    for _ in range(6):
        pair.a.send(FrameType.OP_REQ, bytes(MAX_PAYLOAD))
    assert pair.log_a.lost == []  # never from inside send
    await pair.log_a.until(lambda: bool(pair.log_a.lost))
    assert isinstance(pair.log_a.lost[0], PeerError)
    assert "has not read" in str(pair.log_a.lost[0])


async def test_close_delivers_what_was_sent_and_is_clean(pair: Pair) -> None:
    for n in range(4):
        pair.b.send(FrameType.PING, b"unread", 0, 0, n)  # a has not read these when it closes
        pair.a.send(FrameType.OP_REQ, bytes(1_000_000), 0, 0, n)
    pair.a.send(FrameType.LEAVE, b"{}")
    pair.a.close()
    assert pair.a.closed
    await pair.log_b.until(lambda: bool(pair.log_b.lost))
    assert [f.type for f in pair.log_b.frames] == [FrameType.OP_REQ] * 4 + [FrameType.LEAVE]
    assert pair.log_b.lost == [None]
    assert pair.log_a.frames == [] and pair.log_a.lost == []
    pair.a.close()
    pair.a.send(FrameType.PING)  # dropped


async def test_an_end_within_a_frame_is_an_error(pair: Pair) -> None:
    pair.a._write((encode_header(FrameType.PING, 100) + b"half",))
    pair.a.close()
    await pair.log_b.until(lambda: bool(pair.log_b.lost))
    assert isinstance(pair.log_b.lost[0], PeerError)
    assert "within a frame" in str(pair.log_b.lost[0])


async def test_garbage_ends_the_connection_once(pair: Pair) -> None:
    pair.a.send(FrameType.PING, b"good")
    pair.a._write((b"garbage" * 20,))
    await pair.log_b.until(lambda: bool(pair.log_b.lost))
    assert isinstance(pair.log_b.lost[0], PeerError)
    pair.b.send(FrameType.PING)
    await pair.log_a.until(lambda: bool(pair.log_a.lost))
    assert len(pair.log_b.lost) == 1
    assert pair.b.closed


async def test_a_killed_peer_is_lost_with_a_reason_over_tls(pair: Pair) -> None:
    pair.a._sock.shutdown(socket.SHUT_RDWR)  # as the kernel does for a killed process: no farewell of TLS
    await pair.log_b.until(lambda: bool(pair.log_b.lost))
    if pair.kind == "tls":
        assert isinstance(pair.log_b.lost[0], IoFailure)
    else:
        assert pair.log_b.lost == [None]


async def test_a_callback_that_raises_loses_no_frame(pair: Pair) -> None:
    raised: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(str(context["exception"])))

    def refuse(connection: FrameConnection, frame: Frame) -> None:
        if frame.seq in (0, 3):
            raise RuntimeError(f"{frame.seq}")

    pair.log_b.hook = refuse
    pair.a._write((b"".join(encode_header(FrameType.PING, 0, 0, 0, n) for n in range(6)),))
    await pair.log_b.until(lambda: len(pair.log_b.frames) == 6)
    assert [f.seq for f in pair.log_b.frames] == list(range(6))
    assert raised == ["0", "3"]


async def test_a_connection_closed_by_a_callback_delivers_nothing_more(pair: Pair) -> None:
    pair.log_b.hook = lambda connection, frame: connection.abort()
    pair.a._write((b"".join(encode_header(FrameType.PING, 0, 0, 0, n) for n in range(6)),))
    await pair.log_a.until(lambda: bool(pair.log_a.lost))
    assert [f.seq for f in pair.log_b.frames] == [0]
    assert pair.log_b.lost == []


async def test_misuse(pair: Pair) -> None:
    with pytest.raises(MisuseError):
        pair.a.start(pair.log_a.on_frame, pair.log_a.on_lost)
    with pytest.raises(MisuseError):
        pair.a.send(FrameType.PING, bytes(MAX_PAYLOAD + 1))


# -- TLS only ---------------------------------------------------------------------------------------------------------


async def serve(
    context: ssl.SSLContext, check: Callable[[PeerIdentity], str | None]
) -> tuple[PeerServer, int, list[Any]]:
    arrived: list[PeerConnection] = []
    server = PeerServer(context, check, arrived.append, timeout_s=0.3)
    [(_, port)] = server.start([("127.0.0.1", 0)])
    return server, port, arrived


async def refusals(server: PeerServer, count: int = 1) -> None:
    async with asyncio.timeout(10):
        while server.refused < count:
            await asyncio.sleep(0.005)


async def test_both_ends_know_each_other(tmp_path: Path) -> None:
    pair = Pair("tls", tmp_path)
    await pair.open()
    assert pair.a.identity == node(1).identity
    assert pair.b.identity == node(2).identity
    assert pair.a._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert pair.b._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    pair.close()


async def test_the_server_refuses_whom_it_does_not_expect() -> None:
    server, port, arrived = await serve(node(1).server, lambda i: None if i.slot == 3 else "slot 2 is not expected")
    log = Log()
    await connect_peer("127.0.0.1", port, node(2).client, log.on_frame, log.on_lost)
    await log.until(lambda: bool(log.lost))
    assert server.refused == 1 and arrived == []
    server.close()


async def test_the_client_refuses_whom_it_does_not_expect() -> None:
    server, port, _ = await serve(node(1).server, lambda i: None)
    log = Log()
    with pytest.raises(PeerError, match="I wanted node 5"):
        await connect_peer(
            "127.0.0.1", port, node(2).client, log.on_frame, log.on_lost, check=lambda i: "I wanted node 5"
        )
    server.close()


@pytest.mark.parametrize("foreign", [node(2, UUID(int=9)), node(2, key=b"x" * 32)], ids=["volume", "key"])
async def test_nodes_of_other_volumes_and_keys_are_refused(foreign: NodeContexts) -> None:
    server, port, arrived = await serve(node(1).server, lambda i: None)
    log = Log()
    with pytest.raises(PeerError, match="has another cluster key, or is not of this volume"):
        await connect_peer("127.0.0.1", port, foreign.client, log.on_frame, log.on_lost)
    await refusals(server)
    assert arrived == []
    server.close()


async def test_clear_text_and_silence_are_refused() -> None:
    server, port, arrived = await serve(node(1).server, lambda i: None)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(encode_header(FrameType.PING, 0))
    _, silent = await asyncio.open_connection("127.0.0.1", port)
    await refusals(server, 2)
    assert arrived == []
    try:
        await reader.read()
    except ConnectionResetError:
        pass
    for stream_writer in (writer, silent):
        stream_writer.close()
        try:
            await stream_writer.wait_closed()
        except ConnectionResetError:
            pass
    server.close()


async def test_a_lost_syn_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel would repeat it after 1, 2, 4 s: each attempt is a new connection, and the old one is closed."""
    begun: list[socket.socket] = []

    async def connect_once(_address: str, _port: int, _local: str | None) -> socket.socket:
        begun.append(socket.socket())
        try:
            if len(begun) < 3:
                await asyncio.get_running_loop().create_future()
        except BaseException:
            begun[-1].close()
            raise
        return begun[-1]

    monkeypatch.setattr(peers, "_tcp_connect_once", connect_once)
    monkeypatch.setattr(peers, "_SYN_S", 0.01)
    async with asyncio.timeout(5):
        found = await peers._tcp_connect("127.0.0.1", 9, None)
    assert found is begun[2]
    assert [sock.fileno() for sock in begun[:2]] == [-1, -1]
    found.close()


async def test_nobody_answers() -> None:
    log = Log()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(IoFailure):
            await connect_peer("127.0.0.1", bound.getsockname()[1], node(2).client, log.on_frame, log.on_lost)
        bound.listen()  # accepted by the kernel, but no handshake
        with pytest.raises(IoFailure, match="no answer within"):
            await connect_peer(
                "127.0.0.1", bound.getsockname()[1], node(2).client, log.on_frame, log.on_lost, timeout_s=0.1
            )
    with pytest.raises(IoFailure):
        await connect_peer("not-numeric", 1, node(2).client, log.on_frame, log.on_lost)


async def test_addresses_that_cannot_be_listened_on() -> None:
    server = PeerServer(node(1).server, lambda i: None, lambda c: None)
    with pytest.raises(IoFailure, match="192.0.2.1"):
        server.start([("127.0.0.1", 0), ("192.0.2.1", 0)])
    server.close()


async def test_closing_ends_handshakes() -> None:
    server, port, _ = await serve(node(1).server, lambda i: None)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        while not server._handshakes:
            await asyncio.sleep(0.005)
        server.close()
        sock.settimeout(5)
        sock.setblocking(False)
        assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 10), 5) == b""


# -- daemon.sock only -------------------------------------------------------------------------------------------------


def same_file(fd: int, path: Path) -> bool:
    return os.fstat(fd).st_ino == path.stat().st_ino


async def test_descriptors_arrive_with_their_frames(unix: Pair, tmp_path: Path) -> None:
    files = [tmp_path / f"f{n}" for n in range(6)]
    for file in files:
        file.write_text(file.name)
    unix.b.pause()  # so that most of it has to be queued
    await asyncio.sleep(0)
    for n, file in enumerate(files):
        fd = os.open(file, os.O_RDONLY)
        unix.a.send(FrameType.FUSE_READY, bytes(2_500_000 if n % 2 else 10), seq=n, fds=[fd, fd])
        os.close(fd)
        unix.a.send(FrameType.PING, b"x", seq=100 + n)
    assert unix.a.backlog_bytes > 0
    taken: dict[int, list[int]] = {}

    def take(connection: UnixFrameConnection, frame: Frame) -> None:
        if frame.type is FrameType.FUSE_READY:
            taken[frame.seq] = connection.take_fds(2)

    unix.log_b.hook = take
    before = len(os.listdir("/proc/self/fd"))
    unix.b.resume()
    await unix.log_b.until(lambda: len(unix.log_b.frames) == 12)
    for n, file in enumerate(files):
        assert all(same_file(fd, file) for fd in taken[n])
        assert not any(os.get_inheritable(fd) for fd in taken[n])
        for fd in taken[n]:
            os.close(fd)
    assert len(os.listdir("/proc/self/fd")) < before  # the queued copies are closed too
    with pytest.raises(PeerError, match="0 descriptors, 1 are needed"):
        unix.b.take_fds(1)


async def test_descriptors_nobody_took_are_closed(unix: Pair) -> None:
    before = len(os.listdir("/proc/self/fd"))
    unix.a.send(FrameType.FUSE_READY, b"", fds=[0, 0])
    await unix.log_b.until(lambda: len(unix.log_b.frames) == 1)
    assert len(os.listdir("/proc/self/fd")) == before + 2
    unix.b.abort()
    unix.a.abort()
    assert len(os.listdir("/proc/self/fd")) == before - 2


async def test_too_many_descriptors(unix: Pair) -> None:
    with pytest.raises(MisuseError):
        unix.a.send(FrameType.FUSE_READY, b"", fds=[0] * 17)
    for _ in range(MAX_UNCLAIMED_FDS // 16 + 1):
        unix.a.send(FrameType.FUSE_READY, b"", fds=[0] * 16)
    await unix.log_b.until(lambda: bool(unix.log_b.lost))
    assert "too many descriptors" in str(unix.log_b.lost[0])


async def test_other_users_are_refused(unix: Pair) -> None:
    path = unix.server._path
    assert os.stat(path).st_mode & 0o777 == 0o600
    os.chmod(path, 0o666)
    os.chmod(unix.path, 0o755)
    for parent in unix.path.parents[:2]:
        os.chmod(parent, 0o755)
    child = os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(path)
                sock.recv(1)
        except OSError:
            os._exit(1)
        os._exit(0)
    await refusals(unix.server)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


async def test_a_path_left_by_a_dead_daemon_is_replaced_and_removed(unix: Pair) -> None:
    other = UnixFrameServer(unix.server._path, lambda c: None)
    other.start()
    other.close()
    with pytest.raises(IoFailure):
        connect_unix(unix.server._path, unix.log_a.on_frame, unix.log_a.on_lost)
    with pytest.raises(IoFailure):
        UnixFrameServer("/nonexistent/daemon.sock", lambda c: None).start()


async def test_a_reset_connection(tmp_path: Path) -> None:
    pair = Pair("tls", tmp_path)
    await pair.open()
    pair.a._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    pair.a.abort()
    await pair.log_b.until(lambda: bool(pair.log_b.lost))
    assert isinstance(pair.log_b.lost[0], IoFailure)
    pair.close()
