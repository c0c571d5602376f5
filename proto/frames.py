"""Frames between daemons (over TLS) and between a daemon and its FUSE layer (daemon.sock), both byte streams.

Header, 32 bytes, network byte order::

    struct frame_header {
        __be16 magic;     /* 0x4D58, "MX" */
        __u8   version;   /* 1 */
        __u8   type;      /* FrameType */
        __be32 length;    /* bytes of payload that follow, at most 4 MiB */
        __be64 epoch;     /* of the sender; 0 before it knows one */
        __be64 session;   /* OP_REQ, OP_REPLY: who asks; else 0 */
        __be64 sequence;  /* OP_REQ, OP_REPLY: which request; PING, PONG: any token; else 0 */
    };

The decoder does no input or output. Everything a peer can do wrong is a PeerError (EPROTO); after one, the decoder
refuses to go on, since the boundaries of a byte stream are lost.
"""

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from operator import attrgetter
from typing import Any, Final, NamedTuple

from mxfs_proto import PROTO_VERSION
from mxfs_proto.errors import MisuseError, PeerError, Refusal
from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode
from mxfs_proto.records import (
    CacheInval,
    LockBast,
    LockDeny,
    LockGrant,
    LockRecord,
    LockRelease,
    LockReq,
    Opens,
)

MAGIC: Final = 0x4D58
VERSION: Final = PROTO_VERSION
MAX_PAYLOAD: Final = 4 * 1024 * 1024
MAX_JSON: Final = 256 * 1024
HEADER: Final = struct.Struct("!HBBIQQQ")
assert HEADER.size == 32

Buffer = bytes | bytearray | memoryview


class FrameType(IntEnum):
    """The `type` byte of the header. docs/wire.md says who sends each and what its payload is."""

    HELLO = 1
    WELCOME = 2
    REFUSE = 3
    OP_REQ = 4
    OP_REPLY = 5
    LOCK = 6
    LEASE = 7
    LEASE_ACK = 8
    FREEZE = 9
    RESUME = 10
    RECLAIM = 11
    RECLAIM_DONE = 12
    MOVE = 13
    LEAVE = 14
    STATUS_REQ = 15
    STATUS_RESP = 16
    FUSE_HELLO = 17
    FUSE_READY = 18
    FUSE_BYE = 19
    PING = 20
    PONG = 21
    EVICT = 22
    RECLAIM_LOCKS = 23
    SYNC = 24
    DIRECT = 25


JSON_TYPES: Final = frozenset(
    {
        FrameType.HELLO,
        FrameType.WELCOME,
        FrameType.REFUSE,
        FrameType.FREEZE,
        FrameType.RESUME,
        FrameType.RECLAIM_DONE,
        FrameType.MOVE,
        FrameType.EVICT,
        FrameType.SYNC,
        FrameType.DIRECT,
        FrameType.LEAVE,
        FrameType.STATUS_REQ,
        FrameType.STATUS_RESP,
        FrameType.FUSE_HELLO,
        FrameType.FUSE_READY,
        FrameType.FUSE_BYE,
    }
)
"""The types whose payload is a JSON object of `pack_json`."""

_TYPES: dict[int, FrameType] = {int(t): t for t in FrameType}


class Frame(NamedTuple):
    """One frame. The payload is the frame's own: nothing overwrites it after it was handed out."""

    type: FrameType
    epoch: int
    session: int
    seq: int
    payload: bytes | memoryview


def encode_header(kind: FrameType, length: int, epoch: int = 0, session: int = 0, seq: int = 0) -> bytes:
    """Return the 32 bytes before a payload of *length* bytes. Raises MisuseError (EINVAL)."""
    if length > MAX_PAYLOAD:
        raise MisuseError(f"a {kind.name} payload of {length} bytes is longer than {MAX_PAYLOAD}")
    try:
        return HEADER.pack(MAGIC, VERSION, kind, length, epoch, session, seq)
    except struct.error as err:
        raise MisuseError(f"header of {kind.name} does not fit: {err}") from err


def _check(fields: tuple[int, ...]) -> FrameType:
    magic, version, kind, length = fields[:4]
    if magic != MAGIC:
        raise PeerError(f"a frame starts with {magic:#06x}, not {MAGIC:#06x}: no MXFS peer, or a lost boundary")
    if version != VERSION:
        raise Refusal(f"a peer of another version: it speaks {version}, we speak {VERSION}")
    if kind not in _TYPES:
        raise PeerError(f"frame type {kind} is unknown")
    if length > MAX_PAYLOAD:
        raise PeerError(f"a frame of {length} bytes, more than the cap of {MAX_PAYLOAD}")
    return _TYPES[kind]


class FrameDecoder:
    """Cuts a byte stream into frames.

    A payload that lies whole in a `bytes` chunk is a view of that chunk, without a copy (small ones, which a view
    would make slower, are copied); one from a mutable chunk, which its owner may reuse, is copied once; one that
    arrives in pieces is gathered in a buffer of its own, once. `tail` and `filled` let a reader receive the rest of
    such a payload straight into that buffer.
    """

    __slots__ = ("_broken", "_head", "_have", "_partial", "_payload")

    _VIEW_FROM = 4096
    """Bytes from which a payload is handed out as a view instead of a copy."""

    def __init__(self) -> None:
        self._head = bytearray()  # the start of a header whose rest has not come
        self._payload: memoryview | None = None  # room for the whole payload of _partial
        self._have = 0  # bytes of _payload that are there
        self._partial: tuple[FrameType, int, int, int] | None = None
        self._broken: PeerError | None = None

    @property
    def idle(self) -> bool:
        """Whether the stream is between two frames (an end of the stream is then clean)."""
        return self._partial is None and not self._head

    def tail(self) -> memoryview | None:
        """Return the room for the missing rest of a payload that has begun, or None between payloads."""
        return None if self._payload is None else self._payload[self._have :]

    def filled(self, count: int) -> Frame | None:
        """Say that *count* bytes of `tail` were received; return the frame when that made it whole."""
        if self._payload is None or self._partial is None or not 0 <= count <= len(self._payload) - self._have:
            raise MisuseError(f"{count} bytes filled in where there was no room for them")
        self._have += count
        if self._have < len(self._payload):
            return None
        frame = Frame(*self._partial, self._payload.toreadonly())
        self._payload, self._partial = None, None
        return frame

    def feed(self, data: Buffer) -> list[Frame]:
        """Take the next bytes of the stream and return the frames they complete. Raises PeerError (EPROTO)."""
        if self._broken is not None:
            raise self._broken
        try:
            return self._feed(data)
        except PeerError as err:
            self._broken = err
            raise

    def _feed(self, data: Buffer) -> list[Frame]:
        frames: list[Frame] = []
        at, end = 0, len(data)
        if self._partial is not None or self._head:
            at = self._continue(data, end, frames)
        unpack, size, types = HEADER.unpack_from, HEADER.size, _TYPES
        stable = type(data) is bytes
        view: memoryview | None = None
        while end - at >= size:
            fields = unpack(data, at)
            magic, version, number, length, epoch, session, seq = fields
            if magic == MAGIC and version == VERSION and length <= MAX_PAYLOAD and number in types:
                kind = types[number]
            else:
                kind = _check(fields)
            at += size
            if length > end - at:
                self._begin(kind, epoch, session, seq, length)
                assert self._payload is not None
                self._have = end - at
                self._payload[: end - at] = memoryview(data)[at:end]
                return frames
            payload: bytes | memoryview
            if length >= self._VIEW_FROM and stable:
                view = view or memoryview(data)
                payload = view[at : at + length]
            else:
                payload = bytes(data[at : at + length])
            at += length
            frames.append(Frame(kind, epoch, session, seq, payload))
        if at < end:
            self._head += data[at:end]
        return frames

    def _begin(self, kind: FrameType, epoch: int, session: int, seq: int, length: int) -> None:
        self._partial = (kind, epoch, session, seq)
        self._payload = memoryview(bytearray(length))
        self._have = 0

    def _continue(self, data: Buffer, end: int, frames: list[Frame]) -> int:
        """Go on with a frame that began in an earlier chunk; return the offset that was reached."""
        at = 0
        if self._head:
            at = min(HEADER.size - len(self._head), end)
            self._head += data[:at]
            if len(self._head) < HEADER.size:
                return at
            fields = HEADER.unpack(self._head)
            kind = _check(fields)
            self._head = bytearray()
            if fields[3] == 0:
                frames.append(Frame(kind, fields[4], fields[5], fields[6], b""))
                return at
            self._begin(kind, fields[4], fields[5], fields[6], fields[3])
        assert self._payload is not None
        count = min(len(self._payload) - self._have, end - at)
        self._payload[self._have : self._have + count] = memoryview(data)[at : at + count]
        frame = self.filled(count)
        if frame is not None:
            frames.append(frame)
        return at + count


def pack_json(value: dict[str, Any]) -> bytes:
    """Return *value* as the payload of a control frame. Raises MisuseError (EINVAL) beyond MAX_JSON bytes."""
    try:
        data = json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False).encode()
    except (TypeError, ValueError) as err:
        raise MisuseError(f"not a JSON object: {err}") from err
    if len(data) > MAX_JSON:
        raise MisuseError(f"a JSON payload of {len(data)} bytes is longer than {MAX_JSON}")
    return data


def unpack_json(payload: Buffer) -> dict[str, Any]:
    """Return the JSON object of a control frame. Raises PeerError (EPROTO)."""
    if len(payload) > MAX_JSON:
        raise PeerError(f"a JSON payload of {len(payload)} bytes, more than the cap of {MAX_JSON}")
    try:
        value = json.loads(bytes(payload))
    except (ValueError, RecursionError) as err:
        raise PeerError(f"a control frame is not JSON: {err}") from err
    if not isinstance(value, dict):
        raise PeerError(f"a control frame holds a JSON {type(value).__name__}, not an object")
    return value


class LockSpec(NamedTuple):
    """A LOCK payload: the byte `kind`, then the record's fields in their order, packed by `format`."""

    kind: int
    record: type[Any]
    format: str


LOCK_PAYLOADS: Final = (
    # `kind` is the number of the netlink command.
    LockSpec(1, LockReq, "QQBIII"),
    LockSpec(2, LockGrant, "QQBQI"),
    LockSpec(3, LockDeny, "QQI"),
    LockSpec(4, LockRelease, "QQBII"),
    LockSpec(5, LockBast, "QQBI"),
    LockSpec(6, CacheInval, "QQQ"),
    LockSpec(15, Opens, "QIII"),
)
_MODES = tuple(LockMode)
_FLAGS = tuple(LockFlag(bits) for bits in range(1 << len(LockFlag)))
_FROM_WIRE: dict[str, Callable[[int], Any]] = {"mode": _MODES.__getitem__, "flags": _FLAGS.__getitem__}


def _lock_packer(spec: LockSpec) -> Callable[[Any], bytes]:
    pack = struct.Struct("!B" + spec.format).pack
    kind, values = spec.kind, attrgetter(*spec.record.__dataclass_fields__)
    return lambda record: pack(kind, *values(record))


_LOCK_PACKERS = {spec.record: _lock_packer(spec) for spec in LOCK_PAYLOADS}
_LOCK_UNPACKERS = {
    spec.kind: (
        struct.Struct("!x" + spec.format),
        spec.record,
        tuple((i, _FROM_WIRE[f]) for i, f in enumerate(spec.record.__dataclass_fields__) if f in _FROM_WIRE),
    )
    for spec in LOCK_PAYLOADS
}


def pack_lock(record: LockRecord) -> bytes:
    """Return the payload of a LOCK frame. Raises MisuseError (EINVAL)."""
    try:
        return _LOCK_PACKERS[type(record)](record)
    except KeyError:
        raise MisuseError(f"{type(record).__name__} does not travel in LOCK frames") from None
    except struct.error as err:
        raise MisuseError(f"{record} does not fit its payload: {err}") from err


def unpack_lock(payload: Buffer) -> LockRecord:
    """Return the record of a LOCK frame. Raises PeerError (EPROTO)."""
    found = _LOCK_UNPACKERS.get(payload[0]) if payload else None
    if found is None:
        raise PeerError("a LOCK frame is empty" if not payload else f"LOCK record {payload[0]} is unknown")
    layout, record, converts = found
    if len(payload) != layout.size:
        raise PeerError(f"a LOCK record of {len(payload)} bytes, {record.__name__} has {layout.size}")
    values: list[Any] = list(layout.unpack(payload))
    try:
        for i, convert in converts:
            values[i] = convert(values[i])
    except IndexError:
        raise PeerError(f"{record.__name__} with a value out of range: {values}") from None
    done: LockRecord = record(*values)
    return done


class ReclaimEntry(NamedTuple):
    """One resource that a node holds a lock on, or has open, when a new home begins. 21 bytes on the wire."""

    ino: int
    generation: int
    mode: LockMode
    opens_r: int
    opens_w: int


_RECLAIM = struct.Struct("!QIBII")
assert _RECLAIM.size == 21
RECLAIM_MAX: Final = 65536
"""Entries of one RECLAIM frame; a node with more sends several."""


def pack_reclaim(entries: Sequence[ReclaimEntry]) -> bytes:
    """Return the payload of a RECLAIM frame: the entries, nothing else. Raises MisuseError (EINVAL)."""
    if len(entries) > RECLAIM_MAX:
        raise MisuseError(f"{len(entries)} entries, {RECLAIM_MAX} fit a RECLAIM frame")
    try:
        return b"".join(_RECLAIM.pack(*entry) for entry in entries)
    except struct.error as err:
        raise MisuseError(f"a reclaim entry does not fit: {err}") from err


def unpack_reclaim(payload: Buffer) -> list[ReclaimEntry]:
    """Return the entries of a RECLAIM frame. Raises PeerError (EPROTO)."""
    count, rest = divmod(len(payload), _RECLAIM.size)
    if rest or count > RECLAIM_MAX:
        raise PeerError(f"a RECLAIM frame of {len(payload)} bytes")
    try:
        return [
            ReclaimEntry(ino, generation, _MODES[mode], opens_r, opens_w)
            for ino, generation, mode, opens_r, opens_w in _RECLAIM.iter_unpack(payload)
        ]
    except IndexError:
        raise PeerError("a reclaim entry has an unknown mode") from None


class LeaseAck(NamedTuple):
    """LEASE_ACK: what the node caches may be used until *lease_ms* after *stamp_ms*, on the node's own clock.

    *stamp_ms* is that of the LEASE frame which this answers, its time of sending. The home counts the same *lease_ms*
    from when it received that frame, which is later, so the lease ends on the node before the home thinks that it has.
    """

    lease_ms: int
    stamp_ms: int


_LEASE = struct.Struct("!Q")
_LEASE_ACK = struct.Struct("!IQ")


def pack_lease(stamp_ms: int) -> bytes:
    """Return the payload of a LEASE frame, by which a node asks for a lease; *stamp_ms*: its monotonic clock now."""
    return _LEASE.pack(stamp_ms)


def unpack_lease(payload: Buffer) -> int:
    """Return the stamp (ms) of a LEASE frame. Raises PeerError (EPROTO)."""
    if len(payload) != _LEASE.size:
        raise PeerError(f"a LEASE frame of {len(payload)} bytes")
    return int(_LEASE.unpack(payload)[0])


def pack_lease_ack(ack: LeaseAck) -> bytes:
    """Return the payload of a LEASE_ACK frame."""
    return _LEASE_ACK.pack(*ack)


def unpack_lease_ack(payload: Buffer) -> LeaseAck:
    """Return the values of a LEASE_ACK frame. Raises PeerError (EPROTO)."""
    if len(payload) != _LEASE_ACK.size:
        raise PeerError(f"a LEASE_ACK frame of {len(payload)} bytes")
    return LeaseAck(*_LEASE_ACK.unpack(payload))


def payload_length(parts: Iterable[Buffer]) -> int:
    """Return the bytes of a payload given in parts (each must be a buffer of single bytes)."""
    return sum(len(part) for part in parts)
