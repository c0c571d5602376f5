"""Sealed UDP announcements, by which the nodes of a volume find each other (the disk's slots are the other way).

Nothing depends on them: an announcement only says where to connect to, and TLS decides who answers there. They are
sealed with a key that only readers of the disk have, so a stranger learns nothing and can make us connect nowhere.
"""

import asyncio
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from ipaddress import AddressValueError, IPv4Address
from typing import Any, Final
from uuid import UUID

import asyncio_dgram
import structlog
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from mxfs_proto.discovery import NONCE_BYTES, PREFIX, Announcement, pack, split, unpack
from mxfs_proto.errors import IoFailure, MisuseError, PeerError
from mxfsd.io.certs import VolumeKeys

log = structlog.get_logger(__name__)

GROUP: Final = "239.255.77.88"
PORT: Final = 7788
MAX_NODES: Final = 4096
"""Nodes whose counters are remembered; a volume has 64 slots, but a node that joins anew may have a new uuid."""
SO_BINDTODEVICE: Final = 25
IFNAMSIZ: Final = 16


@dataclass(frozen=True, slots=True)
class DiscoveryConfig:
    """Where announcements go: to a multicast group, or to a broadcast address, or to named peers. IPv4 only."""

    port: int = PORT
    multicast: str = GROUP
    broadcast: str | None = None
    peers: tuple[str, ...] = ()
    """Addresses, each with an optional `:port`."""
    iface: str | None = None
    """Interface to send on and to listen on; without it the routing table decides."""
    ttl: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535 or not 1 <= self.ttl <= 255:
            raise MisuseError(f"discovery port {self.port}, ttl {self.ttl}")
        if self.broadcast and self.peers:
            raise MisuseError("broadcast= and peer= exclude each other")
        if not _address(self.multicast).is_multicast:
            raise MisuseError(f"{self.multicast} is no multicast group")
        if self.iface is not None and not 1 <= len(self.iface.encode()) < IFNAMSIZ:
            raise MisuseError(f"{self.iface!r} is no interface name")
        _ = self.targets  # says what is wrong with the others

    @property
    def mode(self) -> str:
        """`multicast`, `broadcast` or `peer`."""
        return "peer" if self.peers else "broadcast" if self.broadcast else "multicast"

    @property
    def targets(self) -> Sequence[tuple[str, int]]:
        """Where each announcement is sent to."""
        if self.broadcast:
            return [(str(_address(self.broadcast)), self.port)]
        if not self.peers:
            return [(self.multicast, self.port)]
        found = []
        for peer in self.peers:
            host, _, port = peer.partition(":")
            if port and not (port.isascii() and port.isdecimal() and 1 <= int(port) <= 65535):
                raise MisuseError(f"peer={peer}: no port")
            found.append((str(_address(host)), int(port) if port else self.port))
        return found


def _address(text: str) -> IPv4Address:
    try:
        return IPv4Address(text)
    except AddressValueError as err:
        raise MisuseError(f"{text!r} is no IPv4 address") from err


class Discovery:
    """Sends our announcements and calls *on_announce(announcement, sender's address)* for those of other nodes.

    `counts` says what became of received datagrams: accepted, own, replayed, foreign (another key or volume),
    malformed; and how many sends failed.
    """

    def __init__(
        self, config: DiscoveryConfig, keys: VolumeKeys, on_announce: Callable[[Announcement, str], None]
    ) -> None:
        self._config = config
        self._volume = keys.volume
        self._seal = ChaCha20Poly1305(keys.discovery)
        self._on_announce = on_announce
        self._stream: Any = None
        self._task: asyncio.Task[None] | None = None
        self._counter = 0
        self._own: tuple[UUID, int] | None = None
        self._seen: dict[UUID, tuple[int, int]] = {}  # node -> its newest (incarnation, counter)
        self.counts: Counter[str] = Counter()

    async def start(self) -> None:
        """Open the socket and begin to listen. Raises IoFailure."""
        if self._stream is not None:
            raise MisuseError("discovery was started before")
        try:
            sock = self._socket()
        except OSError as err:
            where = f"interface {self._config.iface}" if self._config.iface else f"port {self._config.port}"
            raise IoFailure(f"discovery on {where}: {err}", err.errno) from err
        self._stream = await asyncio_dgram.from_socket(sock)
        self._task = asyncio.get_running_loop().create_task(self._listen(self._stream))

    def _socket(self) -> socket.socket:
        config = self._config
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            sock.setblocking(False)
            # Daemons of several volumes share the port. Multicast and broadcast reach all of them; with peer= only
            # one of them would get a datagram, so such volumes need ports of their own.
            if config.mode != "peer":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            index = 0
            if config.iface is not None:
                index = socket.if_nametoindex(config.iface)
                sock.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, config.iface.encode() + b"\0")
            if config.mode == "broadcast":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            elif config.mode == "multicast":
                # struct ip_mreqn, ip(7): group, local address, interface index.
                request = struct.pack("=4s4si", socket.inet_aton(config.multicast), bytes(4), index)
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, request)
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, config.ttl)
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)  # other nodes on this host
            sock.bind(("", config.port))
        except BaseException:
            sock.close()
            raise
        return sock

    async def announce(self, announcement: Announcement) -> None:
        """Send *announcement*, with our next counter, to every target. What the network refuses is only counted."""
        if self._stream is None:
            raise MisuseError("discovery was not started")
        if announcement.volume != self._volume:
            raise MisuseError(f"an announcement of volume {announcement.volume} on {self._volume}")
        own = (announcement.node_uuid, announcement.incarnation)
        if own != self._own:
            self._own, self._counter = own, 0
        self._counter += 1
        record = pack(replace(announcement, counter=self._counter))
        nonce = os.urandom(NONCE_BYTES)
        datagram = PREFIX + nonce + self._seal.encrypt(nonce, record, PREFIX)
        for target in self._config.targets:
            try:
                await self._send(datagram, target)
            except asyncio_dgram.TransportClosed:
                return

    async def _send(self, datagram: bytes, target: tuple[str, int]) -> None:
        while True:
            try:
                await self._stream.send(datagram, target)
                return
            except OSError as err:
                # asyncio-dgram raises the error of an *earlier* datagram here, before it sends this one: go on, or
                # a target that cannot be reached would keep the next one from hearing of us. Each is raised once.
                self._failed(err)

    def _failed(self, err: OSError) -> None:
        self.counts["failed"] += 1
        if self.counts["failed"] & (self.counts["failed"] - 1) == 0:  # 1, 2, 4, 8 ...
            log.warning("announcement_failed", reason=str(err), count=self.counts["failed"])

    async def _listen(self, stream: Any) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                datagram, sender = await stream.recv()
            except asyncio_dgram.TransportClosed:
                return
            except OSError as err:  # of an earlier send: asyncio reports it here
                self._failed(err)
                continue
            announcement = self._open(datagram)
            if announcement is not None:
                # By way of the loop: an exception of the receiver is reported there and does not end this task.
                loop.call_soon(self._on_announce, announcement, str(sender[0]))

    def _open(self, datagram: bytes) -> Announcement | None:
        """Return the announcement of a datagram when it is new, of this volume and not ours; count the others."""
        try:
            nonce, sealed = split(datagram)
            announcement = unpack(self._seal.decrypt(nonce, sealed, PREFIX))
        except PeerError as err:
            self._drop("malformed", str(err))
            return None
        except InvalidTag:
            self._drop("foreign", "sealed with another key")
            return None
        node, stamp = announcement.node_uuid, (announcement.incarnation, announcement.counter)
        if announcement.volume != self._volume:
            self._drop("foreign", f"volume {announcement.volume}")
        elif self._own is not None and node == self._own[0]:
            self.counts["own"] += 1
        elif stamp <= self._seen.get(node, (-1, -1)):
            self.counts["replayed"] += 1
        else:
            if len(self._seen) >= MAX_NODES and node not in self._seen:
                self._seen.pop(next(iter(self._seen)))
            self._seen[node] = stamp
            self.counts["accepted"] += 1
            return announcement
        return None

    def _drop(self, why: str, reason: str) -> None:
        self.counts[why] += 1
        if self.counts[why] & (self.counts[why] - 1) == 0:
            log.info("announcement_dropped", why=why, reason=reason, count=self.counts[why])

    async def close(self) -> None:
        """Stop to listen. Can be repeated."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        if self._stream is not None:
            self._stream.close()
            self._stream = None
            await asyncio.sleep(0)  # the transport closes its socket in the loop's next turn
