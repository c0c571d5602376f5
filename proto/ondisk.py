"""The records of the lockspace, 4096 bytes each, every one declared once.

``docs/ondisk.md`` has the same tables; a unit test compares them. Integers are little-endian.
"""

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from mxfs_proto.errors import MediaError, MisuseError

RECORD_BYTES = 4096
MAGIC = b"MXFSLOCK"
VERSION = 1
SLOT_COUNT = 64
ADDRESS_COUNT = 4
NAME_BYTES = 64
LABEL_BYTES = 12
KEY_BYTES = 32
UUID_BYTES = 16

HEADER_RECORD = 0
"""Record number of the first header copy; the second one is the last record of the device."""
LEASE_RECORDS = (1, 2)
"""Record numbers of the two lease copies: sequence number ``n`` is written to copy ``n % 2``."""
SLOT_RECORD = 16
"""Record number of slot 1; the slots follow each other."""
FIXED_RECORDS = SLOT_RECORD + SLOT_COUNT
DEFAULT_LOCKSPACE_BYTES = 16 << 20
MIN_LOCKSPACE_BYTES = 1 << 20
MAX_LOCKSPACE_BYTES = 1 << 30


class TornRecord(MediaError):
    """A checksum does not match: a write was cut in two, or the medium lost bits."""


class ForeignRecord(MediaError):
    """Not a record of MXFS, or one of another kind or for another place than the one it was read from."""


class OtherVersion(MediaError):
    """Written by another version of the format."""


class DeviceTooSmall(MediaError):
    """The volume is longer than what this host sees of its device."""


class WrongVolume(MediaError):
    """Belongs to another volume."""


class Kind(IntEnum):
    """What a record is."""

    HEADER = 1
    LEASE = 2
    SLOT = 3
    PENDING = 4
    MOVED = 5


class LeaseState(IntEnum):
    """State of the home lease."""

    FREE = 0
    HELD = 1
    MOVING = 2


class SlotState(IntEnum):
    """State of a node's slot.

    FAILED is the last gasp of a node whose daemon and FUSE layer died; RESTARTING of one whose daemon died while its
    FUSE layer waits for the next daemon. After either the lower XFS is shut down and nothing cached here is served.
    """

    FREE = 0
    CLAIMING = 1
    JOINING = 2
    ACTIVE = 3
    LEFT = 4
    FAILED = 5
    RESTARTING = 6


@dataclass(frozen=True)
class Field:
    """One field: its name, struct format and meaning."""

    name: str
    format: str
    meaning: str


class Layout:
    """A sequence of fields without padding, and the struct that packs it."""

    def __init__(self, name: str, size: int, fields: tuple[Field, ...]) -> None:
        self.name = name
        self.fields = fields
        self.struct = struct.Struct("<" + "".join(field.format for field in fields))
        if self.struct.size != size:
            raise MisuseError(f"layout {name} is {self.struct.size} bytes, not {size}")

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return self.struct.size

    def rows(self) -> list[str]:
        """Return the rows of the table in ``docs/ondisk.md``: offset, bytes, format, name, meaning."""
        rows, offset = [], 0
        for field in self.fields:
            size = struct.calcsize("<" + field.format)
            rows.append(f"| {offset} | {size} | `{field.format}` | {field.name} | {field.meaning} |")
            offset += size
        return rows


ENVELOPE = Layout(
    "envelope",
    48,
    (
        Field("magic", "8s", "`MXFSLOCK`"),
        Field("version", "H", "format version, 1"),
        Field("kind", "H", "1 header, 2 lease, 3 slot, 4 pending header, 5 moved"),
        Field("body_bytes", "I", "length of the body's fields"),
        Field("volume", "16s", "uuid of the XFS file system"),
        Field("sequence", "Q", "one more at each write of the record"),
        Field("body_crc", "I", "CRC-32 of bytes 48 to 4095"),
        Field("header_crc", "I", "CRC-32 of bytes 0 to 43"),
    ),
)

HEADER = Layout(
    "header",
    92,
    (
        Field("cluster_key", "32s", "random secret that all keys and certificates derive from"),
        Field("label", "12s", "label, UTF-8, zero padded"),
        Field("device_bytes", "Q", "size of the device when it was formatted"),
        Field("lockspace_offset", "Q", "byte offset of record 0"),
        Field("lockspace_bytes", "Q", "length, up to the end of the second header copy"),
        Field("xfs_bytes", "Q", "size that the XFS file system before it has, or may grow to"),
        Field("created_s", "Q", "time of creation, seconds since 1970"),
        Field("slot_count", "H", "64"),
        Field("reserved", "6s", "zero"),
    ),
)

MOVED = Layout(
    "moved",
    24,
    (
        Field("old_offset", "Q", "byte offset of record 0 of the lockspace that this record is in"),
        Field("new_offset", "Q", "byte offset of record 0 of the one that has taken its place, behind it"),
        Field("new_bytes", "Q", "length of that one"),
    ),
)

LEASE = Layout(
    "lease",
    64,
    (
        Field("epoch", "Q", "one more at each claim; 0 before the first"),
        Field("incarnation", "Q", "incarnation of the owner's slot"),
        Field("renewals", "Q", "lease counter, one more at each write by the owner"),
        Field("nonce", "Q", "random number of the claim"),
        Field("owner_uuid", "16s", "node uuid of the owner"),
        Field("owner_slot", "H", "slot of the owner, 0 for none"),
        Field("target_slot", "H", "slot that a MOVING lease is meant for, else 0"),
        Field("state", "B", "0 FREE, 1 HELD, 2 MOVING"),
        Field("reserved", "11s", "zero"),
    ),
)

ADDRESS = Layout(
    "address",
    20,
    (
        Field("family", "B", "0 unused, 4 or 6"),
        Field("reserved", "B", "zero"),
        Field("port", "H", "TCP port"),
        Field("address", "16s", "4 or 16 bytes in network order, zero padded"),
    ),
)

SLOT = Layout(
    "slot",
    224,
    (
        Field("node_uuid", "16s", "uuid of the node that has or had the slot"),
        Field("name", "64s", "host name, UTF-8, zero padded"),
        Field("incarnation", "Q", "one more at each claim of the slot"),
        Field("counter", "Q", "heartbeat counter, one more at each write"),
        Field("nonce", "Q", "random number of the claim"),
        Field("pr_key", "Q", "SCSI persistent reservation key of this incarnation, 0 for none"),
        Field("epoch_seen", "Q", "epoch of the lease that the node read last"),
        Field("heartbeat_ms", "I", "the node's heartbeat period"),
        Field("lease_ms", "I", "the node's lease length"),
        Field("node_dead_ms", "I", "the node's limit for others' counters"),
        Field("slot", "H", "number of this slot, 1 to 64"),
        Field("state", "B", "0 FREE, 1 CLAIMING, 2 JOINING, 3 ACTIVE, 4 LEFT, 5 FAILED, 6 RESTARTING"),
        Field("is_home", "B", "1 while the node renews the home lease"),
        Field("address_0", "20s", "address, see below"),
        Field("address_1", "20s", "address"),
        Field("address_2", "20s", "address"),
        Field("address_3", "20s", "address"),
        Field("reserved", "8s", "zero"),
    ),
)

LAYOUTS = (ENVELOPE, HEADER, MOVED, LEASE, SLOT, ADDRESS)
_BODY = {Kind.HEADER: HEADER, Kind.LEASE: LEASE, Kind.SLOT: SLOT, Kind.PENDING: HEADER, Kind.MOVED: MOVED}
_CRC_AT = ENVELOPE.size - 4
_CRC = struct.Struct("<I")


def volume_id(uuid: bytes) -> int:
    """Return the 64-bit FNV-1a hash of the 16 bytes of the XFS uuid (the seed's volume id)."""
    value = 0xCBF29CE484222325
    for byte in uuid:
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFF_FFFF_FFFF_FFFF
    return value


def format_uuid(uuid: bytes) -> str:
    """Return 16 bytes in the usual text form, 8-4-4-4-12."""
    text = uuid.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def parse_uuid(text: str) -> bytes:
    """Return the 16 bytes of a uuid in text form. Raises MisuseError."""
    try:
        raw = bytes.fromhex(text.replace("-", ""))
    except ValueError as error:
        raise MisuseError(f"not a uuid: {text!r}") from error
    if len(raw) != UUID_BYTES:
        raise MisuseError(f"not a uuid: {text!r}")
    return raw


def slot_record(slot: int) -> int:
    """Return the record number of slot 1..64."""
    if not 1 <= slot <= SLOT_COUNT:
        raise MisuseError(f"no slot {slot}: slots are 1 to {SLOT_COUNT}")
    return SLOT_RECORD + slot - 1


def seal(kind: Kind, volume: bytes, sequence: int, body: bytes) -> bytes:
    """Return the 4096 bytes of a record: envelope, body, zeros."""
    if len(volume) != UUID_BYTES:
        raise MisuseError("a volume uuid has 16 bytes")
    rest = body.ljust(RECORD_BYTES - ENVELOPE.size, b"\0")
    head = ENVELOPE.struct.pack(MAGIC, VERSION, kind, len(body), volume, sequence, zlib.crc32(rest), 0)
    head = head[:_CRC_AT] + _CRC.pack(zlib.crc32(head[:_CRC_AT]))
    return head + rest


def unseal(data: bytes, kind: Kind, volume: bytes | None) -> tuple[bytes, int, tuple[Any, ...]]:
    """Return (volume uuid, sequence, body fields) of a record.

    *volume* None accepts any. Raises TornRecord, ForeignRecord, OtherVersion or WrongVolume.
    """
    if len(data) != RECORD_BYTES:
        raise TornRecord(f"{kind.name} record has {len(data)} bytes instead of {RECORD_BYTES}")
    magic, version, found, size, uuid, sequence, body_crc, header_crc = ENVELOPE.struct.unpack_from(data)
    if magic != MAGIC:
        raise ForeignRecord(f"no {kind.name} record of MXFS: wrong magic")
    if zlib.crc32(data[:_CRC_AT]) != header_crc:
        raise TornRecord(f"{kind.name} record: checksum of the envelope does not match")
    if version != VERSION:
        raise OtherVersion(f"{kind.name} record has format version {version}, this is version {VERSION}")
    if volume is not None and uuid != volume:
        raise WrongVolume(f"{kind.name} record belongs to volume {format_uuid(uuid)}")
    if found != kind or size != _BODY[kind].size:
        raise ForeignRecord(f"expected a {kind.name} record, found kind {found} of {size} bytes")
    if zlib.crc32(data[ENVELOPE.size :]) != body_crc:
        raise TornRecord(f"{kind.name} record: checksum of the body does not match")
    return uuid, sequence, _BODY[kind].struct.unpack_from(data, ENVELOPE.size)


def _text(raw: bytes, what: str) -> str:
    try:
        return raw.rstrip(b"\0").decode()
    except UnicodeDecodeError as error:
        raise ForeignRecord(f"{what} is not UTF-8") from error


def _raw(text: str, limit: int, what: str) -> bytes:
    raw = text.encode()
    if len(raw) > limit:
        raise MisuseError(f"{what} is longer than {limit} bytes: {text!r}")
    if "\0" in text:
        raise MisuseError(f"{what} contains a zero byte")
    return raw


@dataclass(frozen=True, slots=True)
class Address:
    """Where a node listens: an IPv4 or IPv6 address in text form and a TCP port."""

    host: str
    port: int

    def encode(self) -> bytes:
        """Return the 20 bytes of ADDRESS. Raises MisuseError for a name instead of an address."""
        try:
            ip = ip_address(self.host)
            return ADDRESS.struct.pack(ip.version, 0, self.port, ip.packed)
        except (ValueError, struct.error) as error:
            raise MisuseError(f"not an address and port: {self.host!r} {self.port}") from error

    @classmethod
    def decode(cls, data: bytes) -> "Address | None":
        """Return the address, or None for an unused field. Raises ForeignRecord."""
        family, _, port, raw = ADDRESS.struct.unpack(data)
        if family == 0:
            return None
        if family == 4:
            return cls(str(IPv4Address(raw[:4])), port)
        if family == 6:
            return cls(str(IPv6Address(raw)), port)
        raise ForeignRecord(f"address of unknown family {family}")


@dataclass(frozen=True, slots=True)
class HeaderRecord:
    """The lockspace header. *volume* is the XFS uuid; sizes and offsets are bytes."""

    volume: bytes
    cluster_key: bytes
    label: str
    device_bytes: int
    lockspace_offset: int
    lockspace_bytes: int
    xfs_bytes: int
    created_s: int

    def __repr__(self) -> str:
        """Leave the key out: reprs end up in logs."""
        return f"HeaderRecord(volume={format_uuid(self.volume)}, label={self.label!r})"

    def encode(self, copy: int, *, pending: bool = False) -> bytes:
        """Return the record; *copy* is 0 for the first copy and 1 for the last record of the device.

        *pending*: it counts only for who is led to it by a MovedRecord.
        """
        if len(self.cluster_key) != KEY_BYTES or len(self.volume) != UUID_BYTES:
            raise MisuseError("cluster key of 32 and uuid of 16 bytes expected")
        body = HEADER.struct.pack(
            self.cluster_key,
            _raw(self.label, LABEL_BYTES, "label"),
            self.device_bytes,
            self.lockspace_offset,
            self.lockspace_bytes,
            self.xfs_bytes,
            self.created_s,
            SLOT_COUNT,
            b"",
        )
        return seal(Kind.PENDING if pending else Kind.HEADER, self.volume, copy, body)

    @classmethod
    def decode(cls, data: bytes, *, pending: bool = False) -> "HeaderRecord":
        """Return the header, or the pending header, of any volume. Raises MediaError (see ``unseal``)."""
        kind = Kind.PENDING if pending else Kind.HEADER
        uuid, _, (key, label, device, offset, length, xfs, created, slots, _) = unseal(data, kind, None)
        if slots != SLOT_COUNT:
            raise OtherVersion(f"lockspace has {slots} slots, this version has {SLOT_COUNT}")
        if offset % RECORD_BYTES or length < MIN_LOCKSPACE_BYTES or not xfs <= offset < offset + length:
            raise ForeignRecord("the header's sizes contradict each other")
        return cls(uuid, key, _text(label, "label"), device, offset, length, xfs, created)


@dataclass(frozen=True, slots=True)
class MovedRecord:
    """Stands in the place of a header: the lockspace has moved behind the old one. Offsets and lengths are bytes."""

    volume: bytes
    old_offset: int
    new_offset: int
    new_bytes: int

    def encode(self, copy: int) -> bytes:
        """Return the record; *copy* as for the header that it replaces."""
        body = MOVED.struct.pack(self.old_offset, self.new_offset, self.new_bytes)
        return seal(Kind.MOVED, self.volume, copy, body)

    @classmethod
    def decode(cls, data: bytes) -> "MovedRecord":
        """Return the record, of any volume. Raises MediaError (see ``unseal``)."""
        uuid, _, (old, new, length) = unseal(data, Kind.MOVED, None)
        if (old | new | length) % RECORD_BYTES or length < MIN_LOCKSPACE_BYTES or not old < new:
            raise ForeignRecord("the offsets of a moved lockspace contradict each other")
        return cls(uuid, old, new, length)


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """The home lease. ``order`` decides which of the two copies on the disk counts."""

    sequence: int = 0
    epoch: int = 0
    state: LeaseState = LeaseState.FREE
    owner_slot: int = 0
    owner_uuid: bytes = bytes(UUID_BYTES)
    incarnation: int = 0
    target_slot: int = 0
    renewals: int = 0
    nonce: int = 0

    @property
    def order(self) -> tuple[int, int]:
        """Epoch first: a late renewal by an older owner never hides a newer epoch."""
        return self.epoch, self.sequence

    def encode(self, volume: bytes) -> bytes:
        """Return the record."""
        body = LEASE.struct.pack(
            self.epoch,
            self.incarnation,
            self.renewals,
            self.nonce,
            self.owner_uuid,
            self.owner_slot,
            self.target_slot,
            self.state,
            b"",
        )
        return seal(Kind.LEASE, volume, self.sequence, body)

    @classmethod
    def decode(cls, data: bytes, volume: bytes) -> "LeaseRecord":
        """Return the lease. Raises MediaError (see ``unseal``)."""
        _, sequence, (epoch, incarnation, renewals, nonce, uuid, owner, target, state, _) = unseal(
            data, Kind.LEASE, volume
        )
        if max(owner, target) > SLOT_COUNT or (state != LeaseState.FREE) != (owner != 0):
            raise ForeignRecord("lease: owner, target and state contradict each other")
        try:
            known = LeaseState(state)
        except ValueError as error:
            raise ForeignRecord(f"lease: unknown state {state}") from error
        return cls(sequence, epoch, known, owner, uuid, incarnation, target, renewals, nonce)


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """A node's slot. ``counter`` is also the sequence number of the record."""

    slot: int
    state: SlotState = SlotState.FREE
    node_uuid: bytes = bytes(UUID_BYTES)
    name: str = ""
    incarnation: int = 0
    counter: int = 0
    nonce: int = 0
    pr_key: int = 0
    epoch_seen: int = 0
    heartbeat_ms: int = 0
    lease_ms: int = 0
    node_dead_ms: int = 0
    is_home: bool = False
    addresses: tuple[Address, ...] = ()

    def same_claim(self, other: "SlotRecord") -> bool:
        """Return whether both were written under one claim, that is by one incarnation of one node."""
        return (self.node_uuid, self.incarnation, self.nonce) == (
            other.node_uuid,
            other.incarnation,
            other.nonce,
        )

    def encode(self, volume: bytes) -> bytes:
        """Return the record. Raises MisuseError for more than 4 addresses or a name of over 64 bytes."""
        if len(self.addresses) > ADDRESS_COUNT:
            raise MisuseError(f"a slot holds {ADDRESS_COUNT} addresses, not {len(self.addresses)}")
        if len(self.node_uuid) != UUID_BYTES:
            raise MisuseError("a node uuid has 16 bytes")
        slot_record(self.slot)
        addresses = [address.encode() for address in self.addresses]
        addresses += [b""] * (ADDRESS_COUNT - len(addresses))
        body = SLOT.struct.pack(
            self.node_uuid,
            _raw(self.name, NAME_BYTES, "node name"),
            self.incarnation,
            self.counter,
            self.nonce,
            self.pr_key,
            self.epoch_seen,
            self.heartbeat_ms,
            self.lease_ms,
            self.node_dead_ms,
            self.slot,
            self.state,
            self.is_home,
            *addresses,
            b"",
        )
        return seal(Kind.SLOT, volume, self.counter, body)

    @classmethod
    def decode(cls, data: bytes, volume: bytes, slot: int) -> "SlotRecord":
        """Return the record of slot number *slot*. Raises MediaError (see ``unseal``)."""
        _, sequence, fields = unseal(data, Kind.SLOT, volume)
        uuid, name, incarnation, counter, nonce, key, epoch, beat, lease, dead, number, state, home = fields[:13]
        if number != slot or sequence != counter or home > 1:
            raise ForeignRecord(f"record of slot {number} found in the place of slot {slot}")
        try:
            known = SlotState(state)
        except ValueError as error:
            raise ForeignRecord(f"slot {slot}: unknown state {state}") from error
        decoded = (Address.decode(raw) for raw in fields[13 : 13 + ADDRESS_COUNT])
        addresses = tuple(address for address in decoded if address is not None)
        text = _text(name, f"name in slot {slot}")
        return cls(
            slot,
            known,
            uuid,
            text,
            incarnation,
            counter,
            nonce,
            key,
            epoch,
            beat,
            lease,
            dead,
            bool(home),
            addresses,
        )
