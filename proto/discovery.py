"""What a node announces of itself by UDP, and the outer form of the sealed datagram.

Datagram::

    __u8 magic[4];      "MXFA"
    __u8 version;       1
    __u8 reserved[3];   0
    __u8 nonce[12];     random
    __u8 sealed[];      ChaCha20-Poly1305 (RFC 8439) of the record, the first 8 bytes being authenticated too

Record, network byte order::

    __u8   volume[16];  uuid
    __u8   node[16];    uuid
    __u8   slot;        1..64
    __u8   home_slot;   0: the node knows of no home
    __be16 port;        of its TLS listener
    __be64 incarnation;
    __be64 epoch;
    __be64 counter;     one more in each datagram of an incarnation
    __u8   address_length;
    __u8   address[];   of its TLS listener, numeric text
"""

import struct
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from mxfs_proto.errors import MisuseError, PeerError
from mxfs_proto.ondisk import SLOT_COUNT

MAGIC: Final = b"MXFA"
VERSION: Final = 1
PREFIX: Final = MAGIC + bytes((VERSION, 0, 0, 0))
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
MAX_ADDRESS: Final = 64
_FIXED = struct.Struct("!16s16sBBHQQQB")
assert len(PREFIX) == 8 and _FIXED.size == 61
MAX_DATAGRAM: Final = len(PREFIX) + NONCE_BYTES + _FIXED.size + MAX_ADDRESS + TAG_BYTES


@dataclass(frozen=True, slots=True)
class Announcement:
    """One node of one volume, as it sees itself. *counter* is set by the sender of the datagrams."""

    volume: UUID
    node_uuid: UUID
    slot: int
    incarnation: int
    address: str
    port: int
    home_slot: int
    epoch: int
    counter: int = 0


def _complaint(slot: int, home_slot: int, port: int, address: str) -> str | None:
    if not 1 <= slot <= SLOT_COUNT or not 0 <= home_slot <= SLOT_COUNT:
        return f"slot {slot}, home {home_slot}"
    if not 1 <= port <= 65535:
        return f"port {port}"
    if not 1 <= len(address) <= MAX_ADDRESS or not (address.isascii() and address.isprintable()):
        return f"address {address!r}"
    return None


def pack(a: Announcement) -> bytes:
    """Return the record of *a*. Raises MisuseError (EINVAL)."""
    wrong = _complaint(a.slot, a.home_slot, a.port, a.address)
    if wrong:
        raise MisuseError(f"an announcement with {wrong}")
    address = a.address.encode("ascii")
    fixed = (a.volume.bytes, a.node_uuid.bytes, a.slot, a.home_slot, a.port, a.incarnation, a.epoch, a.counter)
    try:
        return _FIXED.pack(*fixed, len(address)) + address
    except struct.error as err:
        raise MisuseError(f"{a} does not fit its datagram: {err}") from err


def unpack(data: bytes) -> Announcement:
    """Return the announcement of an opened record. Raises PeerError (EPROTO)."""
    if len(data) < _FIXED.size:
        raise PeerError(f"an announcement of {len(data)} bytes")
    volume, node, slot, home, port, incarnation, epoch, counter, length = _FIXED.unpack_from(data)
    if len(data) != _FIXED.size + length:
        raise PeerError(f"an announcement of {len(data)} bytes with an address of {length}")
    address = data[_FIXED.size :].decode("latin-1")
    wrong = _complaint(slot, home, port, address)
    if wrong:
        raise PeerError(f"an announcement with {wrong}")
    return Announcement(UUID(bytes=volume), UUID(bytes=node), slot, incarnation, address, port, home, epoch, counter)


def split(datagram: bytes) -> tuple[bytes, bytes]:
    """Return nonce and sealed part. Raises PeerError for what is not one of our datagrams."""
    if len(datagram) > MAX_DATAGRAM or len(datagram) < len(PREFIX) + NONCE_BYTES + TAG_BYTES:
        raise PeerError(f"a datagram of {len(datagram)} bytes")
    if not datagram.startswith(MAGIC):
        raise PeerError("a datagram that is no MXFS announcement")
    if not datagram.startswith(PREFIX):
        raise PeerError(f"an announcement of a peer of another version: {datagram[4]}, ours is {VERSION}")
    return datagram[len(PREFIX) : len(PREFIX) + NONCE_BYTES], datagram[len(PREFIX) + NONCE_BYTES :]
