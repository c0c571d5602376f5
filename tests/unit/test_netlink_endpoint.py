"""The netlink endpoint on real sockets: bursts into tiny buffers, foreign senders, errors, a peer that goes away."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from mxfs_proto.errors import IoFailure, MisuseError, MxfsError, PeerError
from mxfs_proto.netlink import GROUPS, decode, encode
from mxfs_proto.records import LockDeny, NodeState, NodeStatus, Record, StatusResp
from mxfsd.core.nlchannel import ChannelConfig
from mxfsd.io.netlink import NETLINK_USERSOCK, NetlinkEndpoint

VOLUME = 0xABCDEF


class Side:
    """An endpoint that remembers what it got."""

    def __init__(self, **kwargs: Any) -> None:
        self.got: list[int] = []
        self.lost: list[MxfsError] = []
        self.changed = asyncio.Event()
        self.hook: Callable[[Record], None] | None = None
        kwargs.setdefault("volume_id", VOLUME)
        self.end = NetlinkEndpoint(self.on_record, on_lost=self.on_lost, **kwargs)
        self.end.open()

    def on_record(self, record: Record) -> None:
        assert isinstance(record, LockDeny)
        self.got.append(record.req_id)
        self.changed.set()
        if self.hook is not None:
            self.hook(record)

    def on_lost(self, err: MxfsError) -> None:
        self.lost.append(err)
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await self.changed.wait()
                self.changed.clear()


@pytest.fixture
async def make() -> AsyncIterator[Callable[..., Side]]:
    sides: list[Side] = []

    def build(**kwargs: Any) -> Side:
        sides.append(Side(**kwargs))
        return sides[-1]

    yield build
    for side in sides:
        side.end.close()


def join(a: Side, b: Side) -> None:
    a.end.connect(b.end.portid)
    b.end.connect(a.end.portid)


async def drained(*sides: Side) -> None:
    """Wait until everything is acknowledged; polled because an acknowledgement makes no callback."""
    async with asyncio.timeout(30):
        while any(side.end.pending for side in sides):
            await asyncio.sleep(0.005)


async def test_a_burst_into_a_tiny_buffer(make: Callable[..., Side]) -> None:
    a, b = make(receive_bytes=1), make(receive_bytes=1)
    join(a, b)
    for n in range(20_000):
        a.end.send(LockDeny(n, 0, 0))
        if n % 4 == 0:
            b.end.send(LockDeny(n, 0, 0))
        if n % 5000 == 0:
            await asyncio.sleep(0)
    await b.until(lambda: len(b.got) >= 20_000)
    await a.until(lambda: len(a.got) >= 5_000)
    await drained(a, b)
    assert b.got == list(range(20_000))
    assert a.got == list(range(0, 20_000, 4))


async def test_messages_that_the_kernel_drops_are_sent_again(make: Callable[..., Side]) -> None:
    """Multicast is how a netlink socket loses messages: ENOBUFS at the receiver, nothing at the sender."""
    a, b = make(receive_bytes=1), make(receive_bytes=1)
    b.end._sock.setsockopt(270, 1, GROUPS["locks"])  # type: ignore[union-attr]  # SOL_NETLINK, ADD_MEMBERSHIP
    join(a, b)
    real = a.end._sock
    assert real is not None

    class Multicasting:
        """Sends what was for the peer to its group instead, so that a full buffer loses it."""

        def send(self, data: bytes) -> int:
            try:
                return real.sendto(data, (0, 1 << (GROUPS["locks"] - 1)))
            except ConnectionRefusedError:
                return len(data)  # about port 0, which the kernel tries after the group

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    a.end._sock = Multicasting()  # type: ignore[assignment]
    for n in range(3_000):
        a.end.send(LockDeny(n, 0, 0))
        if n % 100 == 0:
            await asyncio.sleep(0)
    await b.until(lambda: len(b.got) >= 3_000)
    await drained(a)
    assert b.got == list(range(3_000))
    assert b.end.overruns > 0


async def test_records_sent_before_connect_arrive(make: Callable[..., Side]) -> None:
    a, b = make(), make()
    a.end.send(LockDeny(1, 0, 0))
    a.end.connect(b.end.portid)
    a.end.send(LockDeny(2, 0, 0))
    b.end.connect(a.end.portid)
    await b.until(lambda: len(b.got) == 2)
    assert b.got == [1, 2]


async def test_other_sockets_are_refused(make: Callable[..., Side]) -> None:
    a, b = make(), make()
    message = encode(LockDeny(66, 0, 0), VOLUME, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_USERSOCK) as other:
        other.bind((0, 0))
        other.sendto(message, (b.end.portid, 0))  # uid 0, but not the peer, before the kernel knows the peer
        join(a, b)
        with pytest.raises(ConnectionRefusedError):
            other.sendto(message, (b.end.portid, 0))
    a.end.send(LockDeny(1, 0, 0))
    await b.until(lambda: b.got == [1])
    assert b.end.refused == 1
    assert b.lost == []


async def test_the_peers_port_in_the_hands_of_another_user_is_refused(make: Callable[..., Side]) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    a, b = make(), make()
    b.end.connect(a.end.portid)
    port = a.end.portid
    a.end.close()
    child = os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_USERSOCK)
            sock.bind((port, 0))
            sock.sendto(encode(LockDeny(66, 0, 0), VOLUME, 1, 0), (b.end.portid, 0))
        except OSError:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    async with asyncio.timeout(10):
        while not b.end.refused:
            await asyncio.sleep(0.005)
    assert b.got == []


async def test_a_receiver_that_raises_loses_no_record(make: Callable[..., Side]) -> None:
    a, b = make(), make()
    raised: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context["exception"]))
    for n in range(10):
        a.end.send(LockDeny(n, 0, 0))  # not connected: one datagram will carry them all

    def refuse(record: Record) -> None:
        if isinstance(record, LockDeny) and record.req_id in (0, 4):
            raise RuntimeError(f"{record.req_id}")

    b.hook = refuse
    join(a, b)
    await b.until(lambda: len(b.got) == 10)
    assert b.got == list(range(10))
    assert [str(e) for e in raised] == ["0", "4"]


async def test_a_peer_that_goes_away(make: Callable[..., Side]) -> None:
    a, b = make(), make()
    join(a, b)
    b.end.close()
    a.end.send(LockDeny(1, 0, 0))
    await a.until(lambda: bool(a.lost))
    assert isinstance(a.lost[0], IoFailure)
    with pytest.raises(MisuseError):
        a.end.send(LockDeny(2, 0, 0))


@pytest.mark.parametrize(
    ("message", "match"),
    [
        (encode(LockDeny(1, 0, 0), VOLUME + 1, 1, 0), "about volume"),
        (encode(LockDeny(1, 0, 0), VOLUME, 1, 7), "was acknowledged"),
        (encode(StatusResp(0, 9), VOLUME, 0, 0), "was acknowledged"),
        (b"\0" * 20, "0 bytes where"),
        (b"\x01\x02", "less than a header"),
    ],
)
async def test_a_peer_that_breaks_the_protocol_is_lost(make: Callable[..., Side], message: bytes, match: str) -> None:
    a, b = make(), make()
    join(a, b)
    assert a.end._sock is not None
    a.end._sock.send(message)
    await b.until(lambda: bool(b.lost))
    assert isinstance(b.lost[0], PeerError)
    assert match in str(b.lost[0])
    assert b.got == []


async def test_an_idle_window_drains(make: Callable[..., Side]) -> None:
    a, b = make(config=ChannelConfig(ack_delay_ms=5)), make(config=ChannelConfig(ack_delay_ms=5))
    join(a, b)
    a.end.send(LockDeny(1, 0, 0))
    await drained(a)
    assert a.end.pending == 0


async def test_listeners_of_a_group(make: Callable[..., Side]) -> None:
    a = make()
    status = NodeStatus(2, NodeState.DEAD, 5, 1, 0)
    a.end.publish(status, "status")  # nobody listens: no error
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_USERSOCK) as listener:
        listener.settimeout(5)
        listener.bind((0, 1 << (GROUPS["status"] - 1)))
        a.end.publish(NodeStatus(1, NodeState.DEAD, 5, 1, 0), "locks")
        a.end.publish(status, "status")
        assert decode(listener.recv(4096)) == status


async def test_misuse(make: Callable[..., Side]) -> None:
    a = make()
    with pytest.raises(MisuseError):
        a.end.open()
    for port in (0, -5, a.end.portid):
        with pytest.raises(MisuseError):
            a.end.connect(port)
    a.end.connect(make().end.portid)
    with pytest.raises(MisuseError):
        a.end.connect(make().end.portid)
    a.end.close()
    a.end.close()
    with pytest.raises(MisuseError):
        a.end.connect(1)
    with pytest.raises(MisuseError):
        a.end.publish(LockDeny(1, 2, 3), "locks")
