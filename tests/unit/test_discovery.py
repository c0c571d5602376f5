"""Discovery: the record and its datagram, and real announcements by peer=, broadcast= and multicast."""

import asyncio
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from netspaces import two_namespaces

from mxfs_proto import discovery as wire
from mxfs_proto.discovery import Announcement
from mxfs_proto.errors import IoFailure, MisuseError, PeerError
from mxfsd.io.certs import VolumeKeys
from mxfsd.io.discovery import Discovery, DiscoveryConfig

VOLUME = UUID(int=0xABC)
KEYS = VolumeKeys.derive(bytes(32), VOLUME)
ONE = Announcement(VOLUME, UUID(int=1), 1, 7, "10.0.0.1", 4711, 2, 5)
TWO = Announcement(VOLUME, UUID(int=2), 2, 1, "fe80::1%eth0", 4712, 2, 5)

announcements = st.builds(
    Announcement,
    st.uuids(),
    st.uuids(),
    st.integers(1, 64),
    st.integers(0, 2**64 - 1),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=64),
    st.integers(1, 65535),
    st.integers(0, 64),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
)


@given(announcements)
def test_round_trip_truncated_and_trailing(announcement: Announcement) -> None:
    data = wire.pack(announcement)
    assert wire.unpack(data) == announcement
    for size in range(len(data)):
        with pytest.raises(PeerError):
            wire.unpack(data[:size])
    with pytest.raises(PeerError):
        wire.unpack(data + b"x")


@given(st.binary(max_size=200))
def test_arbitrary_bytes(data: bytes) -> None:
    for decode in (wire.unpack, wire.split):
        try:
            decode(data)
        except PeerError:
            pass


def test_the_bytes_of_a_record() -> None:
    assert (
        wire.pack(replace(ONE, counter=9)).hex()
        == (f"{VOLUME.hex}{UUID(int=1).hex}01021267" + "0000000000000007" + "0000000000000005" + "0000000000000009")
        + "08"
        + b"10.0.0.1".hex()
    )


@pytest.mark.parametrize(
    "change",
    [
        {"slot": 0},
        {"slot": 65},
        {"home_slot": 65},
        {"port": 0},
        {"address": ""},
        {"address": "x" * 65},
        {"address": "ä"},
    ],
)
def test_values_out_of_range(change: dict[str, Any]) -> None:
    with pytest.raises(MisuseError):
        wire.pack(replace(ONE, **change))
    with pytest.raises(MisuseError):
        wire.pack(replace(ONE, epoch=2**64))


def test_values_out_of_range_from_a_peer() -> None:
    raw = bytearray(wire.pack(ONE))
    raw[32] = 65
    with pytest.raises(PeerError, match="slot 65"):
        wire.unpack(bytes(raw))
    raw = bytearray(wire.pack(ONE))
    raw[-1] = 0
    with pytest.raises(PeerError, match="address"):
        wire.unpack(bytes(raw))


@pytest.mark.parametrize(
    ("datagram", "match"),
    [
        (wire.PREFIX + bytes(20), "28 bytes"),
        (wire.PREFIX + bytes(200), "208 bytes"),
        (b"HTTP" + bytes(60), "no MXFS announcement"),
        (wire.MAGIC + b"\2" + bytes(60), "another version: 2"),
    ],
)
def test_datagrams_that_are_not_ours(datagram: bytes, match: str) -> None:
    with pytest.raises(PeerError, match=match):
        wire.split(datagram)


@pytest.mark.parametrize(
    "config",
    [
        {"port": 0},
        {"ttl": 0},
        {"multicast": "10.0.0.1"},
        {"broadcast": "nonsense"},
        {"peers": ("10.0.0.1:99999",)},
        {"peers": ("10.0.0.1:x",)},
        {"peers": ("host",)},
        {"broadcast": "10.0.0.255", "peers": ("10.0.0.1",)},
        {"iface": ""},
        {"iface": "a-name-that-is-too-long"},
    ],
)
def test_configurations_that_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(MisuseError):
        DiscoveryConfig(**config)


def test_targets() -> None:
    assert DiscoveryConfig().targets == [("239.255.77.88", 7788)]
    assert DiscoveryConfig(port=1, broadcast="10.0.0.255").targets == [("10.0.0.255", 1)]
    assert DiscoveryConfig(peers=("10.0.0.1", "10.0.0.2:5")).targets == [("10.0.0.1", 7788), ("10.0.0.2", 5)]


# -- real datagrams ---------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("", 0))
        return int(sock.getsockname()[1])


class Node:
    """A started Discovery and what it has heard."""

    def __init__(self, config: DiscoveryConfig, keys: VolumeKeys = KEYS) -> None:
        self.heard: list[tuple[Announcement, str]] = []
        self.changed = asyncio.Event()
        self.fail = False
        self.discovery = Discovery(config, keys, self.on_announce)

    def on_announce(self, announcement: Announcement, sender: str) -> None:
        self.heard.append((announcement, sender))
        self.changed.set()
        if self.fail:
            raise RuntimeError("the receiver failed")

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.002)

    @property
    def counts(self) -> dict[str, int]:
        return dict(self.discovery.counts)


async def two_by_peer(keys: VolumeKeys = KEYS) -> tuple[Node, Node, int]:
    a_port, b_port = free_port(), free_port()
    a = Node(DiscoveryConfig(port=a_port, peers=(f"127.0.0.1:{b_port}",)))
    b = Node(DiscoveryConfig(port=b_port, peers=(f"127.0.0.1:{a_port}",)), keys)
    await a.discovery.start()
    await b.discovery.start()
    return a, b, b_port


async def test_announcements_by_peer_addresses() -> None:
    a, b, _ = await two_by_peer()
    await a.discovery.announce(ONE)
    await b.discovery.announce(TWO)
    await a.discovery.announce(ONE)
    await b.until(lambda: len(b.heard) == 2)
    await a.until(lambda: len(a.heard) == 1)
    assert b.heard == [(replace(ONE, counter=1), "127.0.0.1"), (replace(ONE, counter=2), "127.0.0.1")]
    assert a.heard == [(replace(TWO, counter=1), "127.0.0.1")]
    with pytest.raises(MisuseError):
        await a.discovery.start()
    with pytest.raises(MisuseError):
        await a.discovery.announce(replace(ONE, volume=UUID(int=5)))
    for node in (a, b):
        await node.discovery.close()
        await node.discovery.close()
    with pytest.raises(MisuseError):
        await a.discovery.announce(ONE)


async def test_a_receiver_that_raises_does_not_stop_listening() -> None:
    raised: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(str(context["exception"])))
    a, b, _ = await two_by_peer()
    b.fail = True
    await a.discovery.announce(ONE)
    await a.discovery.announce(ONE)
    await b.until(lambda: len(b.heard) == 2)
    assert raised == ["the receiver failed"] * 2
    await a.discovery.close()
    await b.discovery.close()


@pytest.mark.parametrize("keys", [VolumeKeys.derive(b"x" * 32, VOLUME), VolumeKeys.derive(bytes(32), UUID(int=9))])
async def test_foreign_keys_and_volumes_are_dropped_and_counted(keys: VolumeKeys) -> None:
    a, b, _ = await two_by_peer(keys)
    await a.discovery.announce(ONE)
    await b.until(lambda: b.counts == {"foreign": 1})
    assert b.heard == []
    await a.discovery.close()
    await b.discovery.close()


async def test_replays_changes_and_nonsense_are_dropped_and_counted() -> None:
    port, other = free_port(), free_port()
    b = Node(DiscoveryConfig(port=port, peers=(f"127.0.0.1:{other}",)))
    await b.discovery.start()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as spy:
        spy.bind(("127.0.0.1", 0))
        spy.settimeout(5)
        a = Node(DiscoveryConfig(port=other, peers=(f"127.0.0.1:{spy.getsockname()[1]}",)))
        await a.discovery.start()
        captured = []
        for announcement in (ONE, ONE, replace(ONE, incarnation=8)):
            await a.discovery.announce(announcement)
            captured.append(spy.recv(1000))
        assert VOLUME.bytes not in captured[0]  # sealed
        assert captured[0] != captured[1]

        async def deliver(datagram: bytes) -> None:
            total = sum(b.counts.values())
            spy.sendto(datagram, ("127.0.0.1", port))
            await b.until(lambda: sum(b.counts.values()) == total + 1)

        await deliver(captured[1])
        await deliver(captured[0])  # older
        await deliver(captured[1])  # again
        await deliver(captured[2])  # the next incarnation begins at 1
        await deliver(captured[1])  # of the incarnation before
        assert b.counts == {"accepted": 2, "replayed": 3}
        for index in range(0, len(captured[0]), 7):
            changed = bytearray(captured[0])
            changed[index] ^= 1
            await deliver(bytes(changed))
        await deliver(b"nonsense")
        assert b.counts["accepted"] == 2 and b.counts["replayed"] == 3
        assert b.counts["malformed"] == 2 + 1  # bytes 0 and 7 are magic and reserved
    await a.discovery.close()
    await b.discovery.close()


async def test_broadcast_reaches_every_daemon_of_the_host_and_our_own_is_known() -> None:
    config = DiscoveryConfig(port=free_port(), broadcast="127.255.255.255")
    a, b = Node(config), Node(config)
    await a.discovery.start()
    await b.discovery.start()
    await a.discovery.announce(ONE)
    await b.until(lambda: len(b.heard) == 1)
    await a.until(lambda: a.counts == {"own": 1})
    await a.discovery.close()
    await b.discovery.close()


async def test_an_interface_that_is_not_there_and_a_network_that_is_down() -> None:
    missing = Node(DiscoveryConfig(port=free_port(), iface="mxfs-none"))
    with pytest.raises(IoFailure, match="mxfs-none"):
        await missing.discovery.start()
    # A broadcast address on a socket that is not for broadcasts: the kernel refuses each send.
    port, other = free_port(), free_port()
    down = Node(DiscoveryConfig(port=port, peers=("255.255.255.255", "255.255.255.255", f"127.0.0.1:{other}")))
    up = Node(DiscoveryConfig(port=other, peers=("127.0.0.1",)))
    await down.discovery.start()
    await up.discovery.start()
    for n in range(1, 4):
        await down.discovery.announce(ONE)
        await up.until(lambda n=n: len(up.heard) == n)  # type: ignore[misc]
    assert down.counts["failed"] >= 4
    await down.discovery.close()
    await up.discovery.close()


@pytest.mark.needs("netns")
async def test_multicast_between_two_namespaces() -> None:
    """Neither has a default route: iface= must be enough."""
    with two_namespaces() as namespaces:
        namespaces.enter(0)
        a = Node(DiscoveryConfig(iface="va"))
        await a.discovery.start()
        deaf = Node(DiscoveryConfig(iface="other"))
        await deaf.discovery.start()
        namespaces.enter(1)
        b = Node(DiscoveryConfig(iface="vb"))
        await b.discovery.start()
        await a.discovery.announce(ONE)
        await b.until(lambda: len(b.heard) == 1)
        await b.discovery.announce(TWO)
        await a.until(lambda: len(a.heard) == 1)
        assert a.heard[0] == (replace(TWO, counter=1), "10.77.0.2")
        assert b.heard[0] == (replace(ONE, counter=1), "10.77.0.1")
        assert deaf.heard == []
        for node in (a, b, deaf):
            await node.discovery.close()
